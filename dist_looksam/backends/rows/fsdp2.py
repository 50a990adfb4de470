"""torch's fully_shard: see backends/fsdp2.py."""

from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ..backend import Backend
from . import BackendRow, OptimizerOf


class FSDP2Row(BackendRow):
    """The optimizer is made over the DTensors of fully_shard."""

    name = "fsdp2"
    flags = frozenset({"shard_ranks"})
    layout = "fsdp2"
    place = 5

    def auto(self, settings: Any, *, ranks: int, launcher: str) -> int:
        return 2 if settings.shard_ranks is not None else 0

    def lacking(self, settings: Any) -> str | None:
        """fully_shard came with torch 2.6; gloo, which CPUs talk by, learnt to average in 2.8."""
        on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
        needed, where = ((2, 8), " on CPUs") if on_cpu else ((2, 6), "")
        if tuple(int(n) for n in torch.__version__.split(".")[:2]) >= needed:
            return None
        return (
            f"backend fsdp2 needs torch >= {needed[0]}.{needed[1]}{where}, got "
            f"{torch.__version__}; install a newer one or use --backend ddp."
        )

    def climbing_ranks(self, settings: Any, ranks: int) -> list[int]:
        """Those that backward reduces over."""
        return sorted({settings.shard_ranks or ranks, ranks})

    def check(self, settings: Any, ranks: int) -> None:
        if ranks % (settings.shard_ranks or ranks):
            fit = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
            raise ConfigError(
                f"shard_ranks must divide the {ranks} ranks, got {settings.shard_ranks}; use "
                f"one of {fit}."
            )

    def make(
        self, settings: Any, model: nn.Module, optimizer_of: OptimizerOf, device: torch.device
    ) -> Backend:
        from .. import fsdp2, fsdp2_units

        how = {"precision": settings.precision, "shard_ranks": settings.shard_ranks}
        fsdp2_units.shard(model, device, **how)
        return fsdp2.FSDP2(model, optimizer_of(model), precision=settings.precision)


ROW = FSDP2Row()
