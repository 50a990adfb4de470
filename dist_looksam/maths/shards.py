"""Sums over tensors that may be spread over ranks.

Words used in maths/:

layer    one parameter tensor.
shard    this rank's piece of one layer; may be empty.
shards   one shard per layer, in the same order on every rank.
[P]      one float64 number per layer. [2, P] is two such rows.
reduce   turns local sums [.., P] into true sums. One collective, or none.
scope    says which layers share one number.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .. import kernels

Shards: TypeAlias = Sequence[Tensor]
Reduce: TypeAlias = Callable[[Tensor], Tensor]
Scope: TypeAlias = Callable[[Tensor], Tensor]


def whole(sums: Tensor) -> Tensor:
    """The reduce of a rank that holds every layer whole: nothing to add."""
    return sums


def per_layer(sums: Tensor) -> Tensor:
    """Every layer keeps its own number."""
    return sums


def per_model(sums: Tensor) -> Tensor:
    """All layers share the sum over the model."""
    return sums.sum(-1, keepdim=True).expand_as(sums)


def dots(xs: Shards, ys: Shards) -> Tensor:
    """[P] local inner products, float64. An empty shard adds 0.

    Products are summed in the tensors' own precision, at least fp32: 16-bit sums would overflow.
    """
    return products((xs, ys))[0]


def _row(x: Tensor) -> Tensor:
    return x.flatten() if x.dtype in (torch.float32, torch.float64) else x.flatten().float()


def products(*pairs: tuple[Shards, Shards], alike: bool = False) -> Tensor:
    """[len(pairs), P] of `dots`; a list in several pairs is read once.

    alike: x.y is y.y, bit for bit, where x equals y; (x, y) and (y, y) are both in `pairs`.
    """
    lists = list({id(xs): xs for pair in pairs for xs in pair}.values())
    if len(lists) <= 2 and (kernel := kernels.fit(*lists)):
        number = {id(xs): n for n, xs in enumerate(lists)}
        rows = kernel.sums(*lists)
        wanted = [number[id(xs)] + number[id(ys)] for xs, ys in pairs]
        every = wanted == list(range(len(rows)))
        return rows if every else torch.stack([rows[n] for n in wanted])
    flat = {id(xs): [_row(x) for x in xs] for pair in pairs for xs in pair}
    exact = {id(ys) for xs, ys in pairs if xs is not ys} if alike else set()
    rows = [
        squares(flat[id(xs)])
        if xs is ys and id(xs) not in exact and on_gpu(xs)
        else _each_dot(flat[id(xs)], flat[id(ys)])
        for xs, ys in pairs
    ]
    return torch.stack(rows)


def on_gpu(xs: Shards) -> bool:
    """Whether launching a kernel for each layer would take longer than running it."""
    return any(x.is_cuda for x in xs)


def _each_dot(xs: Shards, ys: Shards) -> Tensor:
    return _row_of([torch.dot(x, y) for x, y in zip(xs, ys, strict=True)])


def _row_of(numbers: list[Tensor]) -> Tensor:
    return torch.stack(numbers).double() if numbers else torch.zeros(0, dtype=torch.float64)


def squares(rows: Shards) -> Tensor:
    """[P] local ||x||^2, float64, of fp32 or fp64 vectors: on a GPU, few kernels for all layers.

    A dot is a kernel or two for each of some hundred layers; launching those takes longer than the
    sums themselves.
    """
    nonempty = [x for x in rows if x.numel()]
    norms = iter(torch._foreach_norm(nonempty) if nonempty else [])
    return _row_of([next(norms) if x.numel() else x.new_zeros(()) for x in rows]).square()


def clones(tensors: Shards) -> list[Tensor]:
    """Clones, by few kernels for all."""
    new = [torch.empty_like(t) for t in tensors]
    if new:
        torch._foreach_copy_(new, list(tensors))
    return new


def scalars(column: Tensor, like: Shards, layers: Sequence[int] | None = None) -> list[Tensor]:
    """One 0-dim number of `column`, [P], per shard, on the shard's device and in its dtype.

    layers: index into [P] of every shard in `like`; by default they are all layers in order.
    """
    kinds = {(x.device, x.dtype) for x in like}
    cast = {kind: column.to(*kind).unbind() for kind in kinds}
    layers = range(len(column)) if layers is None else layers
    return [cast[x.device, x.dtype][i] for i, x in zip(layers, like, strict=True)]


def ratio(over: Tensor, under: Tensor, *, otherwise: float) -> Tensor:
    """over / under where under > 0, else `otherwise`; NaN and inf in `under` pass through."""
    none = under == 0
    return (over / (under + none)).masked_fill_(none, otherwise)
