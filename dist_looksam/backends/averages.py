"""The exponential moving average (EMA) of the weights, on this rank's shards of fp32 masters.

After step t, counted from 1:  a_t = d_t a_{t-1} + (1 - d_t) w_t,  d_t = min(decay, 1 - t^(-2/3)).

So a_1 = w_1, and a short run is not an average over its random start. This is timm's ModelEmaV3
with warm-up. A skipped step counts as one that left w unchanged.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..maths.shards import clones
from .backend import Read
from .flat import NO_GROUP, Flat

KEY = "ema"  # its name in a checkpoint


class Averages:
    """Of the trained layers. Elementwise on each rank's own shards: nothing is sent.

    Args:
        decay: d above, in (0, 1); 0.9998 averages over about 5,000 steps.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.swapped = False  # the masters hold the averages
        self._of: dict[Tensor, Tensor] = {}  # by master

    @torch.no_grad()
    def update_(self, flats: Sequence[Flat], step: int) -> None:
        """Take in the weights after step `step`, counted from 1."""
        masters = [flat.master.detach() for flat in _trained(flats)]
        averages = list(self._all(flats))
        keep = min(self.decay, 1 - step ** (-2 / 3))
        torch._foreach_lerp_(averages, masters, 1 - keep)

    @torch.no_grad()
    def swap_(self, flats: Sequence[Flat]) -> None:
        """Exchange weights and averages, to the bit; one shard more memory for a moment."""
        for flat, average in zip(_trained(flats), self._all(flats), strict=True):
            master = flat.master.detach()
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self.swapped = not self.swapped

    def check_not_swapped(self, what: str) -> None:
        """ConfigError inside `averaged`, where `what` would take the averages for the weights."""
        if self.swapped:
            raise ConfigError(
                f"{what} must come after `with engine.averaged()`, got it inside, where the "
                f"averages stand for the weights; call it once the block has ended."
            )

    def of(self, flat: Flat) -> Tensor | None:
        """A flat's average; None before the first step and for frozen layers."""
        return self._of.get(flat.master)

    @torch.no_grad()
    def load(self, flats: Sequence[Flat], read: Read) -> None:
        """The averages of a checkpoint; where it has none, the weights that were loaded."""
        self._of = {}
        for flat, average in zip(_trained(flats), self._all(flats), strict=True):
            flat.write_(average, [read(p.name, KEY, p.start, p.stop) for p in flat.pieces])

    def num_bytes(self) -> int:
        """Bytes on this rank."""
        return sum(a.numel() * a.element_size() for a in self._of.values())

    def _all(self, flats: Sequence[Flat]) -> Iterator[Tensor]:
        """The average of every trained flat; of a new one, its weights."""
        for flat in _trained(flats):
            if flat.master not in self._of:
                self._of[flat.master] = clones([flat.master.detach()])[0]
            yield self._of[flat.master]


def _trained(flats: Sequence[Flat]) -> list[Flat]:
    return [flat for flat in flats if flat.group != NO_GROUP]
