"""What ranks hold and send, by how a backend lays weights, gradients and state over them.

One file here is one layout, found by its place in this folder; a backend's row names its own.
"""

from typing import Any

from ...rows import load_rows
from ..run import Run


class Layout:
    """Everything whole on one rank, nothing sent; others say where they differ.

    A module of this folder binds an instance to the name ROW. Bytes and entries are of one rank.

    Attributes:
        name: as in a backend's row.
        split: norms of layers are added up over ranks.
        silent_alone: one rank sends nothing, not even to itself.
        needs_streams: what `hides` says is so on devices that compute and send at once only.
    """

    name: str
    place = 0
    split = False
    silent_alone = True
    needs_streams = False

    def shard(self, run: Run) -> int:
        """Entries of this rank's part of masters and state, padding included."""
        return run.work.parameters

    def autocast(self, run: Run) -> bool:
        """16-bit arithmetic over fp32 weights."""
        return run.sixteen

    def weights(self, run: Run) -> int:
        """Bytes between steps of what forward sees."""
        return run.weight_bytes * run.work.parameters

    def masters(self, run: Run) -> int:
        """Bytes of fp32 weights beside them."""
        return 0

    def counters(self, run: Run) -> int:
        """Tensors that count their steps in the base optimizer's state."""
        return run.work.layers

    def in_backward(self, run: Run) -> tuple[int, int]:
        """Bytes of (gradients, buckets) beside activations at their most."""
        return 4 * run.work.parameters if run.accumulation > 1 else 0, 0

    def in_step(self, run: Run) -> int:
        """Bytes of gradients as the optimizer gets them, and of what waits beside them."""
        return 4 * run.work.parameters

    def norms(self, run: Run, look: bool) -> int:
        """Small all-reduces of a step: sums over layers that are split."""
        return 0

    def sent(self, run: Run) -> dict[str, Any]:
        """The large collectives: fields of `sent.Sent`."""
        return {}

    def hides(self, run: Run) -> bool:
        """Communication goes on while a pass computes."""
        return True


LAYOUTS: dict[str, Layout] = load_rows(__name__, __path__)
