"""One process: see backends/plain.py."""

from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ..backend import Backend
from . import BackendRow, OptimizerOf


class PlainRow(BackendRow):
    """One rank, no communication."""

    name = "plain"
    layout = "whole"
    place = 1

    def auto(self, settings: Any, *, ranks: int, launcher: str) -> int:
        return int(ranks == 1)

    def check(self, settings: Any, ranks: int) -> None:
        if ranks > 1:
            raise ConfigError(
                f"backend {self.name} is for one rank, got {ranks}; use --backend auto."
            )

    def join(self, world: Any, device: torch.device, timeout: float) -> None:
        return None

    def make(
        self, settings: Any, model: nn.Module, optimizer_of: OptimizerOf, device: torch.device
    ) -> Backend:
        from ..plain import Plain

        model.to(device)
        return Plain(model, optimizer_of(model), precision=settings.precision)


ROW = PlainRow()
