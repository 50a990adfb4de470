"""The planned run: resolved settings, model and ranks."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..backends.rows import BACKENDS
from ..errors import ConfigError
from ..maths.together import Groups
from ..optim import table
from ..optim.bases import Base
from ..settings.config import Settings
from .network import Topology
from .workload import BYTES, Workload

if TYPE_CHECKING:
    from .layouts import Layout


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """settings are resolved; micro_batch is the one that the plan assumes."""

    settings: Settings
    work: Workload
    ranks: Topology
    micro_batch: int

    @property
    def layout(self) -> "Layout":
        """The formulas of the backend's memory and communication."""
        from .layouts import LAYOUTS  # which know `PlannedRun`

        return LAYOUTS[self.settings.backend_row.layout or ""]

    @property
    def accumulation(self) -> int:
        """Micro-batches a step."""
        return self.settings.batch_size // (self.micro_batch * self.ranks.total)

    @property
    def groups(self) -> Groups | None:
        """The groups of m samples; None where all climb together, or none do."""
        return replace(self.settings, micro_batch=self.micro_batch).groups(self.ranks.total)

    @property
    def sixteen(self) -> bool:
        """Whether arithmetic is in 16 bits."""
        return BYTES[self.settings.precision] == 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight in forward, and of its gradient."""
        return 4 if self.layout.autocast(self) else BYTES[self.settings.precision]

    @property
    def row(self) -> table.Method:
        return table.method(self.settings.optimizer)

    @property
    def base(self) -> Base:
        return table.base_row(table.base_of(self.settings.optimizer, self.settings.base))

    @property
    def looks(self) -> float:
        """Looks a step, on average over the run."""
        steps = self.settings.steps or 1
        return self.settings.rule.num_looks(steps) / steps

    @property
    def shares(self) -> dict[str, float]:
        """The share of steps that look, that reuse g_v or may do so, and of the others."""
        steps = self.settings.steps or 1
        window = self.settings.rule.num_in_window(steps) / steps
        kinds = {"base": 1 - window, "reuse": window - self.looks, "look": self.looks}
        return {kind: share for kind, share in kinds.items() if share > 0}

    @property
    def shard(self) -> int:
        """Entries of this rank's part of masters and state, padding included."""
        return self.layout.shard(self)

    def at(self, micro_batch: int) -> "PlannedRun":
        """The same run with another micro-batch."""
        return replace(self, micro_batch=micro_batch)


def check(settings: Settings) -> None:
    """ConfigError for settings that the formulas do not cover."""
    row = settings.backend_row
    if row.layout is None:
        *names, last = (name for name, other in BACKENDS.items() if other.layout)
        raise ConfigError(
            f"plan counts the backends {', '.join(names)} and {last}, got {row.name}; "
            f"{row.uncounted}."
        )
    if settings.offload:
        raise ConfigError("plan counts no offload to the host's memory, got offload; leave it out.")
