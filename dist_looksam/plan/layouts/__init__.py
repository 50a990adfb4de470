"""Memory and communication by layout: how a backend distributes weights, gradients and state.

Each file of this folder is one layout; a backend's row names its own.
"""

from typing import Any

from ...maths.together import Groups
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
        return run.weight_bytes * run.work.parameters

    def masters(self, run: PlannedRun) -> int:
        """Bytes of additional fp32 weights."""
        return 0

    def counters(self, run: PlannedRun) -> int:
        """Number of step counters in the base optimizer's state."""
        return run.work.layers

    def in_backward(self, run: PlannedRun) -> tuple[int, int]:
        """Bytes of (gradients, buckets) at the time of most activations."""
        return 4 * run.work.parameters if run.accumulation > 1 else 0, 0

    def in_step(self, run: PlannedRun) -> int:
        """Bytes of gradients and buffers in the optimizer's step."""
        return 4 * run.work.parameters

    def in_look(self, run: PlannedRun) -> int:
        """Bytes of w0 and g, and with several groups of samples of the sum of their g_s."""
        return (8 if run.groups is None else 12) * run.shard

    def beside_look(self, run: PlannedRun) -> int:
        """Bytes that the optimizer's step adds to those of the look, whose w0 is put back before
        the base steps, and whose sum of g_s is then the gradient."""
        done = bool(run.row.ascent) + (run.groups is not None)
        return 4 * run.shard * (run.base.temporaries - done) + self.in_step(run)

    def in_groups(self, run: PlannedRun, groups: Groups) -> dict[str, Any]:
        """What differs in a look of several groups: fields of `sent.Sent`."""
        return {}

    def norms(self, run: PlannedRun, look: bool) -> int:
        """Number of small all-reduces of a step: sums over split layers."""
        return 0

    def sent(self, run: PlannedRun) -> dict[str, Any]:
        """The large collectives: fields of `sent.Sent`."""
        return {}

    def hides(self, run: PlannedRun) -> bool:
        """Whether communication overlaps with computing."""
        return True


def sum_of_g(run: PlannedRun, groups: Groups) -> Call:
    """All-reduces of g as one message: of its sum, and of each group's among its ranks, which are
    counted as if over all ranks."""
    among = groups.rounds if groups.ranks > 1 else 0
    return Call(kind="all_reduce", elements=run.work.parameters, size=4, times=1 + among)


LAYOUTS: dict[str, Layout] = load_rows(__name__, __path__)
