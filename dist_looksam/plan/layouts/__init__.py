"""Memory and communication by layout: how a backend distributes weights, gradients and state.

Each file of this folder is one layout; a backend's row names its own.
"""

from typing import Any

from ...rows import load_rows
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
