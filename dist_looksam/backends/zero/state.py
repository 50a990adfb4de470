"""The state of a ZeRO rank: its pieces of weights and state, for checkpoints and for sums."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...maths.shards import whole
from ...optim.sharpness import Sharpness
from ..flat import Flat
from ..plain import num_bytes, state_bytes
from ..ranks import TorchRanks
from ..stored import StoredLayers
from .layout import Layout


class ZeroState(TorchRanks, StoredLayers):
    """The part of `Zero` that changes no weights. Attributes as there."""

    engine: Any
    optimizer: Sharpness
    layout: Layout
    device: torch.device
    replicas: tuple[int, int]
    stage: int
    rank: int
    size: int

    # Sums.

    def reduce(self, sums: Tensor) -> Tensor:
        """Add over the ranks that split a layer; at stage 0 every rank has all: nothing to add."""
        if self.stage == 0:
            return whole(sums)
        sums = sums.to(self.device)
        dist.all_reduce(sums, group=self.layout.group)
        return sums

    def memory(self) -> dict[str, int]:
        params = list(self.engine.module.parameters())
        weights = num_bytes(getattr(p, "ds_tensor", p) for p in params)
        masters = num_bytes(f.master for f in self.layout.flats)
        shared = self.stage == 0 or (self.stage == 3 and params[0].dtype == torch.float32)
        ema = 0 if self.ema is None else self.ema.num_bytes()
        own = {"weights": weights, "masters": 0 if shared else masters, "ema": ema}
        return {**own, **state_bytes(self.optimizer, masters)}

    # Checkpoints.

    def held(self) -> Sequence[Flat]:
        return [*self.layout.flats, *self.layout.frozen()]

    def after_load(self) -> None:
        """See `StoredLayers.after_load`."""
        self.layout.publish()

    def read_scale(self) -> dict[str, Any]:
        """See `StoredLayers.read_scale`."""
        return self.layout.read_scale()

    def write_scale(self, saved: dict[str, Any]) -> None:
        """See `StoredLayers.write_scale`."""
        self.layout.write_scale(saved)

    def whole(self, tensor: Tensor) -> Tensor:
        """See `StoredLayers.whole`: one reduce."""
        pieces = {p.name: (f, i) for f in self.held() for i, p in enumerate(f.pieces)}
        name = self.layout.names.get(id(tensor), "")
        if name not in pieces:  # a buffer, or frozen and whole
            return tensor.detach()
        flat, i = pieces[name]
        piece = flat.pieces[i]
        whole = torch.zeros(torch.Size(piece.shape).numel(), device=self.device)
        whole[piece.start : piece.stop] = flat.read(flat.master.detach())[i]
        if self.stage > 0:
            dist.reduce(whole, 0, group=self.layout.group)
        return whole.view(piece.shape)
