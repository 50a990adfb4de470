"""DeepSpeed ZeRO: see backends/zero/."""

import importlib.util
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..backend import Backend
from ..compiled import compiled_kinds
from ..zero import config
from . import BackendRow, OptimizerOf


class ZeroRow(BackendRow):
    """Stages 0 to 3."""

    name = "zero"
    flags = frozenset({"zero_stage", "offload", "deepspeed_config"})
    layout = "zero"
    place = 3

    def auto(self, settings: Any, *, ranks: int, launcher: str) -> int:
        return 3 if launcher == "deepspeed" else 2 if settings.zero_stage is not None else 0

    def lacking(self, settings: Any) -> str | None:
        if importlib.util.find_spec("deepspeed") is not None:
            return None
        return (
            "backend zero needs deepspeed, which is not installed; "
            "install it (pip install 'deepspeed>=0.19,<0.20') or use --backend ddp."
        )

    def resolve(self, settings: Any) -> dict[str, Any]:
        """The stage and the clipping, which the DeepSpeed file may say, too."""
        file = config.read(settings.deepspeed_config)
        return {
            "zero_stage": config.stage_of(file, settings.zero_stage),
            "clip": config.clip_of(file, settings.clip),
        }

    def check(self, settings: Any, ranks: int) -> None:
        """Also where the user's DeepSpeed file and the flags disagree."""
        self.deepspeed_config(settings, ranks)

    def climbing_ranks(self, settings: Any, ranks: int) -> list[int]:
        """Fewer than all only where every rank has its own gradient whole. None apart at stage 1 in
        16 bits: eps is added to weights in 16 bits there, which round most of it away."""
        if settings.zero_stage in (2, 3) or settings.offload:
            return [ranks]
        if settings.zero_stage == 1 and settings.precision != "fp32":
            return []
        return super().climbing_ranks(settings, ranks)

    def deepspeed_config(self, settings: Any, ranks: int) -> dict[str, Any]:
        """What deepspeed.initialize gets. ConfigError as of `config.make`."""
        return config.make(
            config.read(settings.deepspeed_config),
            stage=settings.zero_stage,
            batch_size=settings.batch_size,
            micro_batch=settings.micro_batch,
            ranks=ranks,
            precision=settings.precision,
            offload=settings.offload,
        )

    def make(
        self, settings: Any, model: nn.Module, optimizer_of: OptimizerOf, device: torch.device
    ) -> Backend:
        from ..zero import library, step

        made = self.deepspeed_config(settings, dist.get_world_size())
        library.gather_whole(compiled_kinds(model), model)
        engine = library.open_engine(model.to(device), optimizer_of(model), made)
        half = settings.precision == "bf16" and settings.zero_stage == 0
        return step.Zero(engine, autocast=torch.bfloat16 if half else None)


ROW = ZeroRow()
