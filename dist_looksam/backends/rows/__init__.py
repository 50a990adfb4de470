"""Backends by name: every module of this folder is one row.

A row imports its library (DeepSpeed, Horovod, torch's FSDP) inside its methods, so that `--help`
and the other backends do not need it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...optim.sharpness import Sharpness
from ...rows import load_rows
from ...world import World
from ...world.roster import Roster, join
from .. import ranks
from ..backend import Backend

OptimizerOf = Callable[[nn.Module], Sharpness]


class BackendRow:
    """One backend. A module of this folder subclasses this and binds an instance to the name ROW.

    `settings` are the program's `Settings`. This package may not import them, so their type here is
    `Any`; a row reads flags by name, after `resolve`.

    Attributes:
        name: as in --backend.
        flags: settings that this backend has and not all others have.
        layout: the formulas of plan/layouts/ for its memory and traffic; None: there are none.
        uncounted: where layout is None: the end of plan's sentence, what to plan instead.
        place: position in lists of names; rows without one come last, by name.
    """

    name: str
    flags: frozenset[str] = frozenset()
    layout: str | None = None
    uncounted: str = "use another --backend"
    place: int = 99

    def auto(self, settings: Any, *, ranks: int, launcher: str) -> int:
        """The priority of this backend for `--backend auto`: 0 no match, 1 by the number of ranks,
        2 by a setting, 3 by the launcher. The highest is taken."""
        return 0

    def lacking(self, settings: Any) -> str | None:
        """A sentence on what this machine lacks for the backend; None: nothing."""
        return None

    def resolve(self, settings: Any) -> dict[str, Any]:
        """Settings that the backend fills in or changes, by name."""
        return {}

    def check(self, settings: Any, ranks: int) -> None:
        """ConfigError for resolved settings that the backend cannot train with, on any machine."""

    def climbing_ranks(self, settings: Any, ranks: int) -> list[int]:
        """How many ranks in a row may share a group of --m samples; see `Backend`."""
        return [n for n in range(1, ranks + 1) if ranks % n == 0]

    def restarting(self) -> Callable[..., Any] | None:
        """run(train, settings, world), which calls train again when workers have joined or left;
        None where the launcher does not restart."""
        return None

    def join(self, world: World, device: torch.device, timeout: float) -> Roster | None:
        """Connect to the other ranks: make torch's process group, if there is none.

        Returns the roster that watches for lost ranks, or None.
        """
        return None if dist.is_initialized() else join(world, device, timeout=timeout)

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, in the order of ranks. Call it after `join`."""
        return ranks.gather(value)

    def make(
        self, settings: Any, model: nn.Module, optimizer_of: OptimizerOf, device: torch.device
    ) -> Backend:
        """The backend of a model that is still on the CPU, and of the optimizer over it."""
        raise NotImplementedError


BACKENDS: dict[str, BackendRow] = load_rows(__name__, __path__)


def chosen(settings: Any, *, ranks: int, launcher: str) -> BackendRow:
    """The row that --backend names; for auto, that of the launcher, settings and ranks."""
    if settings.backend in BACKENDS:
        return BACKENDS[settings.backend]
    rows = BACKENDS.values()
    return max(rows, key=lambda row: row.auto(settings, ranks=ranks, launcher=launcher))
