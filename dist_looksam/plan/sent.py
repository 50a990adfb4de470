"""The collectives of a step, by its kind and by the layout of its backend.

Tests compare them with the counts of torch's profiler in real runs, and with the kernel's counters
of a network interface.
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
    ahead      publishes before the first pass: 1 where the method perturbs before it.
    small      number of collectives of a few numbers, in the whole step; only their latency counts.
    passes     forward and backward passes.
    """

    gathers: tuple[Call, ...] = ()
    again: tuple[Call, ...] = ()
    gradients: tuple[Call, ...] = ()
    reduces: int = 1
    publish: tuple[Call, ...] = ()
    ahead: int = 0
    small: int
    passes: int
    accumulation: int

    def calls(self) -> list[Call]:
        """All collectives of the step except the small ones, with `times` multiplied out."""
        every = []
        for calls, times in (
            (self.gathers, self.passes * self.accumulation),
            (self.again, self.passes * self.accumulation),
            (self.gradients, self.passes * self.reduces),
            (self.publish, self.passes + self.ahead),
        ):
            every += [replace(c, times=c.times * times) for c in calls]
        return every


def sent(run: PlannedRun, *, look: bool) -> Sent:
    """The collectives of a look, or of another step."""
    passes, layout = 2 if look else 1, run.layout
    if run.ranks.total == 1 and layout.silent_alone:
        return Sent(small=0, passes=passes, accumulation=run.accumulation)
    ahead = int(run.row.along_momentum)
    small = 1 + layout.norms(run, look)
    if layout.norms(run, look):  # sums of the momentum and, in 16 bits, of the rounded eps
        small += ahead * (1 + run.sixteen)
    parts = layout.sent(run)
    return Sent(small=small, passes=passes, accumulation=run.accumulation, ahead=ahead, **parts)
