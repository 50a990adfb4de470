"""Numbers of settings: parsed exactly, checked against upper limits, divided over ranks."""

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from ..maths.together import possible

# Limits of torch, the operating system and the clock. Kernels compute in fp32, for example
# lr x weight decay x lr_scaling.
_LARGEST = {int: 2**31 - 1, float: 10**9}
_MOST = {
    "seed": 2**63 - 1, "image_size": 2**14, "workers": 1024, "timeout": 10**7, "epochs": 10**6,
    "warmup_epochs": 10**6, "local_rank": 2**16, "clip": 10**30, "p": float("inf"),
}  # fmt: skip


def check_most(name: str, value: Any, kind: Any) -> None:
    """ConfigError for a number above the limit of its setting."""
    most = _MOST.get(name, _LARGEST.get(kind))
    if most is not None and (value or 0) > most:
        raise ConfigError(f"{name} must be <= {most:,}, got {value}.")


def check_range(name: str, value: float | None, least: float, most: float) -> None:
    """ConfigError for a number of a command's flag outside of [least, most], and for NaN."""
    if value is not None and not least <= value <= most:
        ends = " and ".join(
            f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (least, most)
        )
        raise ConfigError(f"{name} must be between {ends}, got {value}.")


def whole(value: Any) -> int:
    """An int, or text like 64 or 1e6. ValueError, TypeError or OverflowError for anything else."""
    if isinstance(value, bool):
        raise ValueError
    try:
        return value if isinstance(value, int) else int(str(value))  # exact beyond 2^53
    except ValueError:
        number = float(value)
        if number != int(number):
            raise
        return int(number)


def share_or_steps(value: Any) -> int | float:
    """A whole number, of steps; or one with a decimal point, a share of the run in [0, 1].

    ValueError or TypeError for anything else.
    """
    if isinstance(value, bool):
        raise ValueError
    try:
        return int(str(value))
    except ValueError:
        number = float(value)
        if 0 <= number <= 1:
            return number
        return whole(value)


def micro_batch(
    batch: int,
    *,
    ranks: int,
    asked: int | None,
    m: int | None = None,
    climbing: Sequence[int] | None = None,
) -> int:
    """`asked`, checked; by default the largest divisor of a rank's share of the batch up to 256,
    one that makes m up where there is one. climbing: as of `together.groups`."""
    unit = ranks * (asked or 1)
    if batch % unit:
        nearest = [n for n in (batch // unit * unit, (batch // unit + 1) * unit) if n]
        part = f"micro_batch {asked} x {ranks}" if asked else f"{ranks}"
        use = " or ".join(map(str, nearest))
        if asked and batch % ranks == 0:
            fits = _largest_divisor(batch // ranks, asked)
            if batch < unit:  # a much larger batch is hardly meant
                use = f"--micro_batch {fits}, or batch_size {use}"
            else:
                use += f", or --micro_batch {fits}"
        raise ConfigError(
            f"batch_size must be {part} ranks x a whole number, got {batch}; use {use}."
        )
    if asked is None and m is not None:
        share = batch // ranks
        for size in range(min(share, 256), 0, -1):
            count = {"micro_batch": size, "accumulation": share // size, "ranks": ranks}
            if share % size == 0 and m in possible(**count, climbing=climbing):
                return size
    return asked or _largest_divisor(batch // ranks, 256)


def _largest_divisor(number: int, most: int) -> int:
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)
