"""What a ZeRO rank holds: sums over ranks, and its pieces of weights and state."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...maths.shards import whole
from ...optim.sharpness import Sharpness
from ..backend import Piece, Read
from ..flat import counters_of, fill, slots_of
from ..plain import num_bytes, state_bytes
from ..ranks import Ranks
from .layout import Layout


class ZeroState(Ranks):
    """The half of `Zero` that moves no weights. Attributes as there."""

    engine: Any
    optimizer: Sharpness
    layout: Layout
    device: torch.device
    copies: tuple[int, int]
    stage: int
    rank: int
    size: int

    # Sums.

    def reduce(self, sums: Tensor) -> Tensor:
        """Add over the ranks that split a layer; nothing at stage 0, where all hold all."""
        if self.stage == 0:
            return whole(sums)
        sums = sums.to(self.device)
        dist.all_reduce(sums, group=self.layout.group)
        return sums

    def memory(self) -> dict[str, int]:
        """See `Backend.memory`."""
        params = list(self.engine.module.parameters())
        weights = num_bytes(getattr(p, "ds_tensor", p) for p in params)
        masters = num_bytes(f.master for f in self.layout.flats)
        shared = self.stage == 0 or (self.stage == 3 and params[0].dtype == torch.float32)
        own = {"weights": weights, "masters": 0 if shared else masters}
        return {**own, **state_bytes(self.optimizer.state, 2 * masters)}

    # Checkpoints.

    def pieces(self) -> list[Piece]:
        """This rank's part of every layer."""
        return [p for flat in self.layout.flats for p in flat.pieces]

    def slots(self) -> list[dict[str, Tensor]]:
        """See `Backend.slots`."""
        return slots_of(self.layout.flats, self.optimizer.state)

    def counters(self) -> dict[str, Any]:
        """See `Backend.counters`. All layers of a flat have the flat's numbers."""
        return {
            **self.optimizer.counters(),
            **counters_of(self.layout.flats, self.optimizer.state),
            "loss_scale": self.layout.read_scale(),
        }

    @torch.no_grad()
    def load(self, read: Read, counters: dict[str, Any]) -> None:
        """See `Backend.load`."""
        fill(self.layout.flats, self.optimizer.state, read, counters)
        self.layout.publish()
        self.optimizer.load_counters(counters)
        self.layout.write_scale(counters["loss_scale"])

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor] | None:
        """See `Backend.full_weights`: layer by layer, one reduce each."""
        weights = self.layout.buffers()
        for piece, slot in zip(self.pieces(), self.slots(), strict=True):
            flat = torch.zeros(torch.Size(piece.shape).numel(), device=self.device)
            flat[piece.start : piece.stop] = slot["weight"]
            if self.stage:
                dist.reduce(flat, 0, group=self.layout.group)
            weights[piece.name] = flat.view(piece.shape).cpu()
        return weights if self.rank == 0 else None
