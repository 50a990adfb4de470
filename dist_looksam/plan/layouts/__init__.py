"""Memory and communication by layout: how a backend distributes weights, gradients and state.

Each file of this folder is one layout; a backend's row names its own.
"""

from dataclasses import replace
from typing import Any

from ...rows import load_rows
from ..network import Call
from ..run import PlannedRun


class Layout:
    """Everything whole on one rank, no communication; subclasses override what differs.

    A module of this folder binds an instance to the name ROW. Bytes and entries are of one rank.

    Attributes:
        name: as in a backend's row.
        split: norms of layers are added up over ranks.
        silent_alone: one rank sends nothing, not even to itself.
        needs_streams: `hides` is true only on devices that compute and send at the same time.
    """

    name: str
    place = 0
    split = False
    silent_alone = True
    needs_streams = False

    def shard(self, run: PlannedRun) -> int:
        """Entries of this rank's part of masters and state, padding included."""
        return run.work.parameters

    def autocast(self, run: PlannedRun) -> bool:
        """Whether 16-bit arithmetic uses fp32 weights."""
        return run.sixteen

    def weights(self, run: PlannedRun) -> int:
        """Bytes of forward's weights between steps."""
        return run.weight_bytes * (run.work.parameters + run.work.frozen)

    def masters(self, run: PlannedRun) -> int:
        """Bytes of additional fp32 weights."""
        return 0

    def counters(self, run: PlannedRun) -> int:
        """Number of step counters in the base optimizer's state."""
        return run.work.layers

    def in_backward(self, run: PlannedRun) -> tuple[int, int]:
        """Bytes of (gradients, buckets) at the time of most activations."""
        return 4 * run.work.parameters if run.accumulation > 1 else 0, 0

    def groups(self, run: PlannedRun) -> int:
        """Bytes that a look of several groups keeps beyond w0 and g: the sum of g_s. With
        micro-batches that climb alone it takes the place of earlier micro-batches' gradients."""
        groups = run.groups
        if groups is None or groups.rounds == 1:
            return 0
        counted = run.accumulation > 1 and groups.micro_batches == 1
        return 0 if counted else 4 * run.shard

    def summed(self, run: PlannedRun) -> tuple[Call, ...]:
        """The all-reduces of such a look in addition to one reduced backward: of g over ranks, or
        of each group's g for its eps."""
        groups, whole = run.groups, run.work.parameters
        if groups is None or groups.ranks == run.ranks.total:
            return ()
        g = Call(kind="all_reduce", elements=whole, size=4)
        return (
            (g,) if groups.ranks == 1 else (g, replace(g, times=groups.rounds, ranks=groups.ranks))
        )

    def publishes(self, run: PlannedRun) -> int:
        """How often such a look makes changed weights visible."""
        return 2

    def in_step(self, run: PlannedRun) -> int:
        """Bytes of gradients and buffers in the optimizer's step."""
        return 4 * run.work.parameters

    def norms(self, run: PlannedRun, look: bool) -> int:
        """Number of small all-reduces of a step: sums over split layers."""
        return 0

    def sent(self, run: PlannedRun) -> dict[str, Any]:
        """The large collectives: fields of `sent.Sent`."""
        return {}

    def hides(self, run: PlannedRun) -> bool:
        """Whether communication overlaps with computing."""
        return True


LAYOUTS: dict[str, Layout] = load_rows(__name__, __path__)
