"""Backends by name: one file here is one row, found by its place in this folder.

What a backend imports (DeepSpeed, Horovod, torch's FSDP) is imported inside the row's methods, so
that `--help` and the other backends do without.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...errors import ConfigError
from ...optim.sharpness import Sharpness
from ...rows import load_rows
from ...world import World
from ...world.roster import Roster
from ..backend import Backend

OptimizerOf = Callable[[nn.Module], Sharpness]


class BackendRow:
    """One backend. A module of this folder subclasses this and binds an instance to the name ROW.

    `settings` are the program's `Settings`, which stand above this room: here they are `Any`, and a
    row reads the flags that it needs, after `resolve`, by their names.

    Attributes:
        name: as in --backend.
        flags: the settings that not every backend has, and that this one has.
        layout: which formulas of plan/layouts/ count its memory and what it sends; None: none do.
        uncounted: where layout is None: the end of plan's sentence, what to plan instead.
        place: in lists of names; rows without one come last, by name.
    """

    name: str
    flags: frozenset[str] = frozenset()
    layout: str | None = None
    uncounted: str = "use another --backend"
    place: int = 99

    def auto(self, settings: Any, *, ranks: int, launcher: str) -> int:
        """How strongly `--backend auto` means this one: 0 not, 1 by the number of ranks, 2 by a
        setting, 3 by the launcher. The highest is taken."""
        return 0

    def lacking(self, settings: Any) -> str | None:
        """The sentence that names what this machine lacks for the backend; None: nothing."""
        return None

    def resolve(self, settings: Any) -> dict[str, Any]:
        """Settings that the backend fills in or changes, by name."""
        return {}

    def check(self, settings: Any, ranks: int) -> None:
        """ConfigError for resolved settings that the backend cannot train with, on any machine."""

    def restarting(self) -> Callable[..., Any] | None:
        """run(train, settings, world), which calls train again after workers came or went, where
        the launcher asks for this; None elsewhere."""
        return None

    def join(self, world: World, device: torch.device, timeout: float) -> Roster | None:
        """Meet the other ranks: torch's process group, if there is none.

        Returns what watches for lost ranks, or None.
        """
        if dist.is_initialized():
            return None
        roster = Roster(world, timeout=timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", roster.store),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout),
        )
        return roster

    def gather(self, thing: Any) -> list[Any]:
        """Everybody's small picklable thing, in the order of ranks; after `join`, before `make`."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, thing)
        return found

    def make(
        self, settings: Any, model: nn.Module, optimizer_of: OptimizerOf, device: torch.device
    ) -> Backend:
        """The backend around a model that is still on the CPU and the optimizer over it."""
        raise NotImplementedError


def refuse_rank_ascent(settings: Any, got: str, instead: str) -> None:
    """ConfigError for --ascent rank, where no rank has whole gradients of its own."""
    if settings.ascent == "rank":
        raise ConfigError(
            f"ascent rank needs whole gradients on every rank, got {got}; "
            f"use {instead}, or --ascent global."
        )


BACKENDS: dict[str, BackendRow] = load_rows(__name__, __path__)


def chosen(settings: Any, *, ranks: int, launcher: str) -> BackendRow:
    """The row that --backend names; for auto, that of the launcher, settings and ranks."""
    if settings.backend in BACKENDS:
        return BACKENDS[settings.backend]
    rows = BACKENDS.values()
    return max(rows, key=lambda row: row.auto(settings, ranks=ranks, launcher=launcher))
