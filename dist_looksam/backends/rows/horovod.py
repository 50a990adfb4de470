"""Horovod, with whole state or state sharded as in ZeRO stage 1: see backends/horovod/."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ..backend import Backend
from . import BackendRow, OptimizerOf


class HorovodRow(BackendRow):
    """Horovod makes its own connections: there is no process group of torch's."""

    name = "horovod"
    flags = frozenset({"zero_stage", "compression"})
    uncounted = "use --backend ddp, whose ranks hold and send the same as Horovod's"
    place = 4

    def auto(self, settings: Any, *, ranks: int, launcher: str) -> int:
        return 3 if launcher == "horovod" else 0

    def lacking(self, settings: Any) -> str | None:
        if importlib.util.find_spec("horovod") is not None:
            return None
        return (
            "backend horovod needs horovod, which is not installed; "
            "install it (bash cluster/horovod/build.sh) or use --backend ddp."
        )

    def check(self, settings: Any, ranks: int) -> None:
        if settings.zero_stage in (2, 3):
            raise ConfigError(
                f"backend horovod shards at zero_stage 1 only, without offload, got zero_stage "
                f"{settings.zero_stage}; use --zero_stage 1 or --backend zero."
            )

    def climbing_ranks(self, settings: Any, ranks: int) -> list[int]:
        """One or all: a process set of Horovod's, for some, must be made before training, and not
        while workers join and leave."""
        return sorted({1, ranks})

    def restarting(self) -> Callable[..., Any] | None:
        """Under elastic horovodrun (--min-np, --max-np). ConfigError if Horovod cannot be loaded
        there."""
        if os.environ.get("HOROVOD_ELASTIC") != "1":
            return None
        _load()
        from ..horovod import elastic

        return elastic.run

    def join(self, world: Any, device: torch.device, timeout: float) -> None:
        _load()
        from ..horovod import whole

        whole.start(world.size)

    def gather(self, value: Any) -> list[Any]:
        from ..horovod import whole

        return whole.gather(value)

    def make(
        self, settings: Any, model: nn.Module, optimizer_of: OptimizerOf, device: torch.device
    ) -> Backend:
        from ..horovod.sharded import HorovodSharded
        from ..horovod.whole import Horovod

        model.to(device)
        kind = HorovodSharded if settings.zero_stage == 1 else Horovod
        how = {"precision": settings.precision, "compression": settings.compression}
        return kind(model, optimizer_of(model), **how)


def _load() -> None:
    """ConfigError if Horovod cannot be loaded, as after torch was changed."""
    try:
        importlib.import_module("horovod.torch")
    except ImportError as error:
        raise ConfigError(
            f"Horovod must be built for torch {torch.__version__}, got one that does not load "
            f"({str(error).splitlines()[0]}); build it again: bash cluster/horovod/build.sh."
        ) from error


ROW = HorovodRow()
