"""torch's DistributedDataParallel: see backends/ddp.py."""

from typing import Any

import torch
from torch import nn

from ..backend import Backend
from . import BackendRow, OptimizerOf


class DDPRow(BackendRow):
    """Every rank holds all weights and state."""

    name = "ddp"
    layout = "buckets"
    place = 2

    def auto(self, settings: Any, *, ranks: int, launcher: str) -> int:
        return int(ranks > 1)

    def make(
        self, settings: Any, model: nn.Module, optimizer_of: OptimizerOf, device: torch.device
    ) -> Backend:
        from ..ddp import DDP

        model.to(device)
        return DDP(model, optimizer_of(model), precision=settings.precision)


ROW = DDPRow()
