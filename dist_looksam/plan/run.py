"""The run that is planned: resolved settings, its model, and how DeepSpeed was told to work."""

from dataclasses import dataclass, replace
from typing import Any

from ..backends.zero import config as zero_config
from ..errors import ConfigError
from ..optim import table
from ..settings import assemble
from ..settings.config import Settings
from .network import Ranks
from .workload import BYTES, Workload

# DeepSpeed 0.19's own, where a file says nothing; numbers are elements.
_ZERO = {
    "reduce_bucket_size": 5e8,
    "allgather_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings are resolved; micro_batch is what the plan assumes."""

    settings: Settings
    work: Workload
    ranks: Ranks
    micro_batch: int

    @property
    def stage(self) -> int | None:
        """ZeRO's; None for plain, DDP and FSDP2."""
        return self.settings.zero_stage if self.settings.backend == "zero" else None

    @property
    def fsdp(self) -> bool:
        """FSDP2, which has no stage."""
        return self.settings.backend == "fsdp2"

    @property
    def units(self) -> tuple[int, ...]:
        """Entries that each rank puts into the gather of each of FSDP2's units: rows are padded."""
        ranks = self.ranks.total
        return tuple(sum(-(-r // ranks) * width for r, width in u) for u in self.work.units)

    @property
    def accumulation(self) -> int:
        """Micro-batches a step."""
        return self.settings.batch_size // (self.micro_batch * self.ranks.total)

    @property
    def sixteen(self) -> bool:
        """Arithmetic in 16 bits."""
        return BYTES[self.settings.precision] == 2

    @property
    def autocast(self) -> bool:
        """16-bit arithmetic over fp32 weights."""
        return self.sixteen and self.stage in (None, 0) and not self.fsdp

    @property
    def weight_bytes(self) -> int:
        """Of one weight that forward sees, and of its gradient."""
        return 4 if self.autocast else BYTES[self.settings.precision]

    @property
    def row(self) -> table.Method:
        return table.method(self.settings.optimizer)

    @property
    def base(self) -> str:
        return table.base_of(self.settings.optimizer, self.settings.base)

    @property
    def looks(self) -> float:
        """Looks a step, on average."""
        if self.row.ascent is None:
            return 0.0
        return 1.0 / self.settings.rule.k

    def zero(self, name: str) -> Any:
        """A setting of DeepSpeed's section zero_optimization, its default where nothing is said."""
        file = zero_config.read(self.settings.deepspeed_config).get("zero_optimization", {})
        found = file.get(name, file.get(name.removeprefix("stage3_"), _ZERO.get(name)))
        return int(found) if name in _ZERO and found is not None else found

    @property
    def overlaps(self) -> bool:
        """DeepSpeed sends gradients while backward goes on: by default at stage 3 alone."""
        said = self.zero("overlap_comm")
        return self.stage == 3 if said is None else bool(said)

    @property
    def shard(self) -> int:
        """Entries of this rank's part of masters and state, padding included."""
        work, ranks = self.work, self.ranks.total
        if self.fsdp:
            return sum(self.units)
        if self.stage in (None, 0):
            return work.parameters
        if self.stage == 3:
            return sum(-(-size // ranks) for size in work.order)
        return sum(-(-sum(group) // ranks) for group in work.groups)

    @property
    def persistent(self) -> tuple[int, ...]:
        """Stage 3's layers that are too small to be given away after use."""
        limit = self.zero("stage3_param_persistence_threshold")
        return tuple(size for size in self.work.order if size <= limit)

    def at(self, micro_batch: int) -> "Run":
        """The same with another micro-batch."""
        return replace(self, micro_batch=micro_batch)


def check(settings: Settings, ranks: int) -> None:
    """ConfigError for what no formula here covers, and for what DeepSpeed refuses."""
    if settings.backend == "horovod":
        raise ConfigError(
            f"plan counts the backends plain, ddp, zero and fsdp2, got {settings.backend}; "
            f"use --backend ddp, whose ranks hold and send the same as Horovod's."
        )
    if settings.offload:
        raise ConfigError("plan counts no offload to the host's memory, got offload; leave it out.")
    if settings.backend == "zero":
        assemble.deepspeed_config(settings, ranks)
