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
    reduces    those backwards, in the whole step.
    publish    after a pass: of changed weights; of FSDP2's shards over blocks of ranks.
    publishes  how often, in the whole step; also before a pass that begins at moved weights.
    summed     once in the step, which nothing hides: sums of a look of several groups.
    small      number of collectives of a few numbers, in the whole step; only their latency counts.
    passes     forward and backward passes.
    """

    gathers: tuple[Call, ...] = ()
    again: tuple[Call, ...] = ()
    gradients: tuple[Call, ...] = ()
    reduces: int = 1
    publish: tuple[Call, ...] = ()
    publishes: int = 1
    summed: tuple[Call, ...] = ()
    small: int
    passes: int
    accumulation: int

    def calls(self) -> list[Call]:
        """All collectives of the step except the small ones, with `times` multiplied out."""
        every = []
        for calls, times in (
            (self.gathers, self.passes * self.accumulation),
            (self.again, self.passes * self.accumulation),
            (self.gradients, self.reduces),
            (self.publish, self.publishes),
            (self.summed, 1),
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
    parts = {"reduces": 1, **layout.sent(run)}
    once = parts["reduces"] == 1 and not layout.split  # else every backward, as at any m
    reduced = passes * parts.pop("reduces")
    summed: tuple[Call, ...] = ()
    groups = run.groups if look and once else None
    if groups is not None:
        of_all = groups.ranks == run.ranks.total
        reduced, summed = 1 + groups.rounds * of_all, layout.summed(run)
    return Sent(
        publishes=layout.publishes(run) if look and run.groups is not None else passes + ahead,
        small=small + (ahead * (1 + run.sixteen) if layout.norms(run, look) else 0),
        passes=passes,
        accumulation=run.accumulation,
        reduces=reduced,
        summed=summed,
        **parts,
    )
