"""m: which samples of the global batch climb together.

The global batch is a sequence of micro-batches: micro-batch a of rank r has number a * ranks + r.
A group is m / micro_batch consecutive ones, or an equal part of one. Each group has its own eps,
along its own mean gradient. Source: Foret et al., arXiv:2010.01412, section 4.1 (m-sharpness).
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
    parts          groups that each micro-batch is split into, where m is smaller.
    """

    ranks: int
    micro_batches: int
    rounds: int
    parts: int = 1


def groups(
    m: int | None,
    *,
    micro_batch: int,
    accumulation: int,
    ranks: int,
    climbing: Sequence[int] | None = None,
    backend: str = "",
    why: str = "",
    flag: str = "m=",
) -> Groups | None:
    """The groups of m samples; None where all samples climb together.

    Args:
        m: samples in a group; None for the whole batch.
        accumulation: micro-batches of each rank in a step.
        climbing: how many ranks in a row may share a group on this backend; None for all divisors.
        backend, why, flag: for the sentence: the backend's name; " by ..." where m is not as given;
            what to write before a number.

    Raises:
        ConfigError: groups would be of unequal size, or cut across ranks or micro-batches, or the
            backend cannot let so few ranks climb apart.
    """
    if m is None or m == micro_batch * accumulation * ranks:
        return None
    found = _of(m, micro_batch, accumulation, ranks)
    apart = found is not None and (climbing is None or found.ranks in climbing)
    if found is not None and apart:
        return found
    how = {"micro_batch": micro_batch, "accumulation": accumulation, "ranks": ranks}
    fit = possible(**how, climbing=climbing)
    nearest = min(fit, key=lambda n: max(n, m) / max(1, min(n, m)))
    batches = f"{accumulation} x {ranks} micro-batches of {micro_batch}"
    if found is None:
        raise ConfigError(
            f"m must divide a micro-batch, or be made of those of neighbouring ranks or of all "
            f"ranks, got {m}{why} with {batches}; use {flag}{nearest}, which is the nearest, or "
            f"another micro_batch."
        )
    raise ConfigError(
        f"m must be {'one of ' if len(fit) > 1 else ''}{', '.join(map(str, fit))} on backend "
        f"{backend} with {batches}, got {m}{why}; use {flag}{nearest}, or backend ddp."
    )


def _of(m: int, micro_batch: int, accumulation: int, ranks: int) -> Groups | None:
    if m < micro_batch and micro_batch % m == 0:
        parts = micro_batch // m
        return Groups(ranks=1, micro_batches=1, rounds=accumulation * parts, parts=parts)
    count, rest = divmod(m, micro_batch)
    if rest or not count:
        return None
    if ranks % count == 0:
        return Groups(ranks=count, micro_batches=1, rounds=accumulation)
    each, rest = divmod(count, ranks)
    if rest or accumulation % each:
        return None
    return Groups(ranks=ranks, micro_batches=each, rounds=accumulation // each)


def possible(
    *, micro_batch: int, accumulation: int, ranks: int, climbing: Sequence[int] | None = None
) -> list[int]:
    """Every m that `groups` takes, ascending."""
    found = {micro_batch * accumulation * ranks}
    parts = [n for n in range(1, micro_batch) if micro_batch % n == 0]
    some = [micro_batch * n for n in range(1, ranks + 1)]
    of_all = [micro_batch * ranks * n for n in range(1, accumulation)]
    for m in (*parts, *some, *of_all):
        group = _of(m, micro_batch, accumulation, ranks)
        if group is not None and (climbing is None or group.ranks in climbing):
            found.add(m)
    return sorted(found)
