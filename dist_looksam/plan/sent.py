"""What a step sends: the collectives of its backend's layout, by kind of step.

Tests hold these against what torch's profiler counts in real runs, and against the kernel's
counters of a network interface.
"""

from dataclasses import dataclass, replace

from .network import Call
from .run import PlannedRun


@dataclass(frozen=True, kw_only=True)
class Sent:
    """The collectives of one step.

    gathers    in each forward, before it needs them; stage 3's large layers, FSDP2's units.
    again      in each backward: FSDP2's units that were freed after their forward.
    gradients  in or after each backward of a micro-batch that `reduces` counts.
    reduces    those backwards, in one pass: 1, or every micro-batch.
    publish    after a pass, when weights have changed.
    small      of a few numbers, in the whole step; only their latency counts.
    passes     forward and backward passes.
    """

    gathers: tuple[Call, ...] = ()
    again: tuple[Call, ...] = ()
    gradients: tuple[Call, ...] = ()
    reduces: int = 1
    publish: tuple[Call, ...] = ()
    small: int
    passes: int
    accumulation: int

    def calls(self) -> list[Call]:
        """All of the step but the small ones, with `times` multiplied out."""
        found = []
        for calls, times in (
            (self.gathers, self.passes * self.accumulation),
            (self.again, self.passes * self.accumulation),
            (self.gradients, self.passes * self.reduces),
            (self.publish, self.passes),
        ):
            found += [replace(c, times=c.times * times) for c in calls]
        return found


def sent(run: PlannedRun, *, look: bool) -> Sent:
    """Of a look, or of any other step."""
    passes, layout = 2 if look else 1, run.layout
    if run.ranks.total == 1 and layout.silent_alone:
        return Sent(small=0, passes=passes, accumulation=run.accumulation)
    small = 1 + layout.norms(run, look)
    parts = layout.sent(run)
    return Sent(small=small, passes=passes, accumulation=run.accumulation, **parts)
