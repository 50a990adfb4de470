"""m: which samples of the global batch climb together.

The global batch is a sequence of micro-batches: micro-batch a of rank r has number a * ranks + r.
A group is m / micro_batch consecutive ones. Each group has its own eps, along its own mean
gradient. Source: Foret et al., arXiv:2010.01412, section 4.1 (m-sharpness).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of a look, as one rank sees them.

    ranks          neighbouring ranks that share a group.
    micro_batches  of each of these ranks in a group.
    rounds         groups that a rank takes part in, one after the other.
    """

    ranks: int
    micro_batches: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a global batch is split over ranks.

    accumulation   micro-batches of each rank in a step.
    climbing_ranks how many ranks in a row may share a group on this backend.
    """

    micro_batch: int
    accumulation: int
    ranks: int
    climbing_ranks: Sequence[int]
    backend: str

    def groups(self, m: int) -> Groups | None:
        """The groups of m samples, at most one of all samples; None where m cannot be."""
        count, rest = divmod(m, self.micro_batch)
        if rest or not count:
            return None
        each, rest = divmod(count, self.ranks)
        if not rest and self.accumulation % each == 0:
            found = Groups(ranks=self.ranks, micro_batches=each, rounds=self.accumulation // each)
            return found if found.rounds == 1 or self.ranks in self.climbing_ranks else None
        if self.ranks % count or count not in self.climbing_ranks:
            return None
        return Groups(ranks=count, micro_batches=1, rounds=self.accumulation)

    def possible(self) -> list[int]:
        """Every m that can be, ascending."""
        of_some = (self.micro_batch * n for n in self.climbing_ranks)
        of_all = (self.micro_batch * self.ranks * n for n in range(1, self.accumulation + 1))
        return sorted(m for m in {*of_some, *of_all} if self.groups(m))


def groups(m: int | None, layout: Layout, *, why: str = "") -> Groups | None:
    """The groups of m samples; None where all samples climb together.

    Args:
        m: samples in a group; None for the whole batch.
        why: " by ..." where m is not what the user gave.

    Raises:
        ConfigError: micro-batches do not make up m, or the backend cannot let so few ranks climb.
    """
    if m is None:
        return None
    found = layout.groups(m)
    if found is None:
        raise ConfigError(refusal(m, layout, why))
    whole = found.ranks == layout.ranks and found.rounds == 1
    return None if whole else found


def refusal(m: int, layout: Layout, why: str) -> str:
    """The sentence on an m that cannot be: which can, the nearest, and what would allow it."""
    fit = layout.possible()
    nearest = min(fit, key=lambda n: max(n, m) / max(1, min(n, m)))
    everywhere = [n for n in range(1, layout.ranks + 1) if layout.ranks % n == 0]
    elsewhere = Layout(**{**layout.__dict__, "climbing_ranks": everywhere}).groups(m)
    on_ddp = elsewhere and layout.backend not in ("plain", "ddp")
    instead = "backend ddp" if on_ddp else "another micro_batch"
    one_of = "one of " if len(fit) > 1 else ""
    return (
        f"m must be {one_of}{', '.join(map(str, fit))} on backend {layout.backend} with "
        f"{layout.accumulation} x {layout.ranks} micro-batches of {layout.micro_batch}, got "
        f"{m}{why}; use {nearest}, or {instead}."
    )
