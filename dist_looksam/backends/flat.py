"""Flattened layers in one tensor, cut into equal partitions by rank: the position of each shard.

A *flat* is one fp32 tensor of this rank that the optimizer has as a parameter. It holds layers one
after another; one that is not on this rank is an empty shard.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .backend import Piece

NO_GROUP = -1  # of layers that the optimizer does not train


@dataclass(frozen=True)
class Flat:
    """One flat, the layers in it, and where each starts: piece i is flat[offsets[i]:][:length].

    `group` is the number of its param group, or NO_GROUP.
    """

    master: Tensor
    group: int
    pieces: tuple[Piece, ...]
    offsets: tuple[int, ...]

    def views(self, like: Tensor) -> list[Tensor]:
        """One shard per layer of a tensor laid out as the flat, without padding."""
        return self._cut(like.view(-1))

    def read(self, like: Tensor) -> list[Tensor]:
        """As `views`, in the order of the layer's entries; copies where memory has another order
        (channels_last)."""
        return self._cut(like.reshape(-1))

    def write_(self, target: Tensor, values: Sequence[Tensor | None]) -> None:
        """Fill a tensor laid out as the flat, one flat tensor per layer; None leaves a layer."""
        if not target.is_contiguous():  # one layer; several lie in a row
            values, views = [v if v is None else v.view(target.shape) for v in values], [target]
        else:
            views = self.views(target)
        for view, new in zip(views, values, strict=True):
            if new is not None:
                view.copy_(new)

    @property
    def whole(self) -> bool:
        """Whether this is one layer, whole and in its own shape."""
        shapes = [p.shape for p in self.pieces if p.stop - p.start == self.master.numel()]
        return len(self.pieces) == 1 and shapes == [tuple(self.master.shape)]

    def _cut(self, row: Tensor) -> list[Tensor]:
        return [
            row[at : at + p.stop - p.start] for p, at in zip(self.pieces, self.offsets, strict=True)
        ]


def cut(
    layers: Sequence[Tensor], names: dict[int, str], master: Tensor, group: int, low: int
) -> Flat:
    """The flat that begins `low` entries into the row of `layers`; `names` by id of the layer."""
    high = low + master.numel()
    pieces, offsets, at = [], [], 0
    for p in layers:
        start = min(max(low - at, 0), p.numel())
        stop = max(start, min(high - at, p.numel()))
        pieces.append(Piece(names[id(p)], tuple(p.shape), start, stop))
        offsets.append(min(max(at + start - low, 0), master.numel()))
        at += p.numel()
    return Flat(master, group, tuple(pieces), tuple(offsets))
