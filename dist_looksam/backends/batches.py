"""Checks of a step's micro-batches: a list, all of one size, since their means weigh equally."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import ConfigError


def check_batches(batches: Any) -> list[int | None]:
    """The number of samples of each micro-batch, None if unknown.

    Raises:
        ConfigError: no list, an empty one, one of no sample, or their sizes differ; or one batch,
            a list of its samples and labels.
    """
    if not isinstance(batches, Sequence) or isinstance(batches, str):
        raise ConfigError(
            f"step needs a list of micro-batches, which a look goes through twice, got "
            f"{type(batches).__name__}; pass [batch], or list(...) of one step's micro-batches."
        )
    if not batches:
        raise ConfigError("step needs at least one micro-batch, got an empty list; pass [batch].")
    kinds = {(batch.dtype, batch.ndim) for batch in batches if isinstance(batch, Tensor)}
    if len(kinds) > 1:
        raise ConfigError(
            f"step needs a list of micro-batches, got one of {len(batches)} tensors of different "
            f"kinds, as the parts of one batch are; pass [batch]."
        )
    sizes = [size_of(batch) for batch in batches]
    check_sizes(sizes)
    if 0 in sizes:
        raise ConfigError(
            "micro-batches must have at least one sample, got one of none, whose mean loss is not "
            "a number; leave the step out on all ranks."
        )
    return sizes


def check_sizes(sizes: Sequence[int | None]) -> None:
    """ConfigError if known sizes differ."""
    known = list(dict.fromkeys(size for size in sizes if size is not None))
    if len(known) > 1:
        raise ConfigError(
            f"micro-batches must have equally many samples, on all ranks, since each one's mean "
            f"loss counts as much, got {' and '.join(map(str, known))}; drop the last samples "
            f"(DataLoader: drop_last=True), or split the batch evenly."
        )


def check_ranks(by_rank: Sequence[Sequence[int | None]]) -> None:
    """ConfigError if the ranks' micro-batches differ in number or in size."""
    counts = sorted({len(sizes) for sizes in by_rank})
    if len(counts) > 1:
        raise ConfigError(
            f"all ranks must have equally many micro-batches a step, got "
            f"{' and '.join(map(str, counts))}; give each rank as many."
        )
    check_sizes([size for sizes in by_rank for size in sizes])


def check_loss(value: Any) -> None:
    """ConfigError unless this is a 0-dim tensor that backward can be called on."""
    if not isinstance(value, Tensor):
        got = f"a {type(value).__name__}"
    elif value.ndim:
        got = f"a tensor of shape {tuple(value.shape)}"
    elif not value.is_floating_point():
        got = f"one in {value.dtype}"
    elif not value.requires_grad:
        got = "one without a gradient (detached, or computed without gradients)"
    else:
        return
    raise ConfigError(
        f"loss must return the mean loss of a micro-batch as a 0-dim tensor with a gradient, got "
        f"{got}; return loss.mean(), of the outputs that the module gave."
    )


def size_of(batch: Any) -> int | None:
    """The first dimension of a batch's tensors; None if they differ in it or there are none."""
    sizes = {t.shape[0] for t in _tensors(batch) if t.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from _tensors(list(batch.values()))
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(batch):
        yield from _tensors(list(vars(batch).values()))


def split(batch: Any, parts: int) -> list[Any]:
    """A batch cut along the first dimension of its tensors, which is that of the samples, into
    equal parts of the same kind. What is no tensor, and 0-dim tensors, go into every part.

    Raises:
        ConfigError: the first dimensions differ, so that it is not known which is the samples'.
    """
    size = size_of(batch)
    if size is None or size % parts:
        raise ConfigError(
            f"m smaller than a micro-batch needs batches whose tensors all have the samples as "
            f"first dimension, a multiple of {parts}, got others; leave m out, or make it whole "
            f"micro-batches."
        )
    step = size // parts
    return [_cut(batch, slice(i * step, (i + 1) * step)) for i in range(parts)]


def _cut(value: Any, part: slice) -> Any:
    if isinstance(value, Tensor):
        return value[part] if value.ndim else value
    if isinstance(value, Mapping):
        cut = {key: _cut(item, part) for key, item in value.items()}
        return cut if isinstance(value, dict) else type(value)(cut)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cut(item, part) for item in value))
    if isinstance(value, list | tuple) and any(True for _ in _tensors(value)):
        return type(value)(_cut(item, part) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{k: _cut(v, part) for k, v in vars(value).items()})
    return value
