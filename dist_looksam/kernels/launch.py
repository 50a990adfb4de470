"""Calls of the kernels. Tensors are those of which `kernels.fit` is true."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import code
from .lists import BLOCK, Blocks, addresses, blocks_of, uploaded

Shards = Sequence[Tensor]
_FUSED: Any = {"num_warps": 4, "enable_fp_fusion": True}
_ROUND = {None: 0, torch.bfloat16: 1, torch.float16: 2}


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _blocks(xs: Shards) -> Blocks:
    return blocks_of(tuple(x.numel() for x in xs), xs[0].device)


def _partial(rows: int, blocks: Blocks) -> Tensor:
    return blocks.table.new_empty((rows, blocks.num), dtype=torch.float32)


def _added(partial: Tensor, blocks: Blocks) -> Tensor:
    """[rows, layers] float64 from sums of blocks."""
    rows = len(partial)
    out = partial.new_empty((rows, blocks.layers), dtype=torch.float64)
    code.add_blocks[blocks.layers, rows](
        partial, blocks.first, out, blocks.layers, blocks.num, BLOCK=256, **_FUSED
    )
    return out


def _places(places: Sequence[int] | None, layers: int, device: torch.device) -> Tensor:
    return uploaded(tuple(range(layers) if places is None else places), torch.int32, device)


def sums(xs: Shards, ys: Shards | None = None) -> Tensor:
    """[1, P] of x.x; with ys [3, P] of (x.x, x.y, y.y). float64, by one pass.

    Where y equals x the three are equal, bit for bit: multiplications are not fused with additions.
    """
    device, blocks = xs[0].device, _blocks(xs)
    with _on(device):
        partial = _partial(1 if ys is None else 3, blocks)
        pointers, aligned = addresses([xs] if ys is None else [xs, ys], device)
        if blocks.num:
            code.sums[blocks.num,](
                pointers, blocks.table, partial, blocks.layers, blocks.num,
                TWO=ys is not None, ALIGNED=aligned, BLOCK=BLOCK,
                num_warps=4, enable_fp_fusion=False,  # else x.y may differ from x.x
            )  # fmt: skip
        return _added(partial, blocks)


def perturb_(
    weights: Shards,
    grads: Shards,
    size: Tensor,
    *,
    sign: bool,
    layers: Sequence[int] | None,
    visible_dtype: torch.dtype | None,
) -> Tensor | None:
    """weights += size grads, or size sign(grads). With a visible dtype returns [3, P]: local sums
    of (a.eps, a.a, eps.eps), a the change of the weights rounded to it."""
    device, blocks = weights[0].device, _blocks(weights)
    with _on(device):
        partial = _partial(3, blocks)
        pointers, aligned = addresses([weights, grads], device)
        if blocks.num:
            code.perturb[blocks.num,](
                pointers, blocks.table, _places(layers, blocks.layers, device),
                *_columns(device, size), partial, blocks.layers, blocks.num,
                SIGN=sign, ROUND=_ROUND[visible_dtype], ALIGNED=aligned, BLOCK=BLOCK, **_FUSED,
            )  # fmt: skip
        _written(weights)
        return None if visible_dtype is None else _added(partial, blocks)


def combine_(
    xs: Shards,
    ys: Shards,
    *,
    last: Tensor | None,
    kept: Tensor | None,
    new_kept: Tensor | None,
    layers: Sequence[int] | None,
) -> None:
    """xs become last x + kept y; with new_kept, ys become x + new_kept y."""
    device, blocks = xs[0].device, _blocks(xs)
    with _on(device):
        pointers, aligned = addresses([xs, ys], device)
        if blocks.num:
            code.combine[blocks.num,](
                pointers, blocks.table, _places(layers, blocks.layers, device),
                *_columns(device, last, kept, new_kept), blocks.layers, blocks.num,
                LAST=last is not None, KEPT=kept is not None, NEW=new_kept is not None,
                ALIGNED=aligned, BLOCK=BLOCK, **_FUSED,
            )  # fmt: skip


def _columns(device: torch.device, *columns: Tensor | None) -> list[Tensor | None]:
    return [None if c is None else c.to(device).contiguous() for c in columns]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One step of LAMB or AdamW. All lists have an entry per layer, but for `steps`.

    ws, xs, ys, gvs, ms, vs  weights; gradient of the last pass; what it is combined with, or none;
                             where the new g_v goes, or none; the base's states.
    steps       0-dim steps taken, one per parameter.
    owners      each layer's parameter, as a number in `steps`.
    places      each layer's number in the columns.
    groups      each layer's group, as a number in `settings`.
    settings    (lr, b1, b2, eps, weight_decay) of every group.
    last, kept, new_kept  [P] float64 or None: the base's gradient is scale (last x + kept y), and
                          g_v is x + new_kept y.
    scale       0-dim float64, or None for 1.
    finite      0-dim bool on the device: where it is false nothing changes; None: it is known.
    """

    ws: Shards
    xs: Shards
    ys: Shards
    gvs: Shards
    ms: Shards
    vs: Shards
    steps: Shards
    owners: Sequence[int]
    places: Sequence[int]
    groups: Sequence[int]
    settings: Sequence[tuple[Any, ...]]
    last: Tensor | None
    kept: Tensor | None
    new_kept: Tensor | None
    scale: Tensor | None
    finite: Tensor | None


def adamw_(job: Job) -> Tensor | None:
    """One step of AdamW. Returns [layers] local ||g_v||^2, with new_kept."""
    device, blocks = job.ws[0].device, _blocks(job.ws)
    with _on(device):
        settings = _settings(job.settings, device)
        partial = _partial(1, blocks)
        _base(job, settings, partial, job.xs, blocks, lamb=False)
        _written(job.ws)
        return None if job.new_kept is None else _added(partial, blocks)[0]


def lamb_(job: Job, *, reduce: Callable[[Tensor], Tensor]) -> Tensor | None:
    """One step of LAMB. Returns [layers] local ||g_v||^2, with new_kept.

    Args:
        reduce: one call of [2, layers with weight decay], if there are such.
    """
    device, blocks = job.ws[0].device, _blocks(job.ws)
    with _on(device):
        settings = _settings(job.settings, device)
        partial = _partial(2 if job.new_kept is None else 3, blocks)
        us = _like(job.ws)
        _base(job, settings, partial, us, blocks, lamb=True)
        found = _added(partial, blocks)
        trusted = [n for n, group in enumerate(job.groups) if job.settings[group][4] != 0]
        squares = found
        if trusted:
            squares = found[:2].index_select(1, uploaded(tuple(trusted), torch.int64, device))
            squares = reduce(squares).to(device)
        slot = dict(zip(trusted, range(len(trusted)), strict=True))
        slots = tuple(slot.get(n, -1) for n in range(blocks.layers))
        pointers, aligned = addresses([job.ws, us], device)
        if blocks.num:
            code.descend[blocks.num,](
                pointers, blocks.table, uploaded(slots, torch.int32, device),
                uploaded(tuple(job.groups), torch.int32, device), squares, settings,
                _flag(job.finite), blocks.layers, blocks.num, len(job.settings), len(trusted),
                CHECKED=job.finite is not None, ALIGNED=aligned, BLOCK=BLOCK, **_FUSED,
            )  # fmt: skip
        _written(job.ws)
        return None if job.new_kept is None else found[2]


def _base(
    job: Job, settings: Tensor, partial: Tensor, us: Shards, blocks: Blocks, *, lamb: bool
) -> None:
    device, params = job.ws[0].device, len(job.steps)
    corrections = settings.new_empty((2, params))
    owner_groups = dict(zip(job.owners, job.groups, strict=True))
    code.count_steps[(params + 255) // 256,](
        addresses([job.steps], device)[0],
        uploaded(tuple(owner_groups[n] for n in range(params)), torch.int32, device),
        settings, corrections, _flag(job.finite), params, len(job.settings),
        WIDE=job.steps[0].dtype == torch.float64, CHECKED=job.finite is not None, BLOCK=256,
        **_FUSED,
    )  # fmt: skip
    ys, gvs = job.ys or job.xs, job.gvs or job.xs
    pointers, aligned = addresses([job.ws, job.xs, job.ms, job.vs, us, ys, gvs], device)
    index = uploaded((*job.places, *job.owners, *job.groups), torch.int32, device)
    if blocks.num:
        code.base[blocks.num,](
            pointers, blocks.table, index, partial,
            *_columns(device, job.last, job.kept, job.new_kept, job.scale),
            settings, corrections, _flag(job.finite),
            blocks.layers, blocks.num, params, len(job.settings),
            LAMB=lamb, LAST=job.last is not None, KEPT=job.kept is not None,
            CLIP=job.scale is not None, NEW=job.new_kept is not None, STORE=bool(job.gvs),
            CHECKED=job.finite is not None, ALIGNED=aligned, BLOCK=BLOCK, **_FUSED,
        )  # fmt: skip


def _settings(groups: Sequence[tuple[Any, ...]], device: torch.device) -> Tensor:
    """[7, groups]: see `code.base`. A rate that is a tensor is copied on the device."""
    rates = [0.0 if isinstance(group[0], Tensor) else float(group[0]) for group in groups]
    rest = [(b1, b2, _log(b1), _log(b2), eps, decay) for _, b1, b2, eps, decay in groups]
    values = (*rates, *(value for row in zip(*rest, strict=True) for value in row))
    settings = uploaded(values, torch.float64, device).view(7, len(groups))
    if any(isinstance(group[0], Tensor) for group in groups):
        settings = settings.clone()
        for n, group in enumerate(groups):
            if isinstance(group[0], Tensor):
                settings[0, n].copy_(group[0])
    return settings


def _log(b: float) -> float:
    return math.log(b) if b > 0 else -math.inf


def _flag(finite: Tensor | None) -> Tensor | None:
    return None if finite is None else finite.view(torch.uint8)


def _like(ws: Shards) -> Sequence[Tensor]:
    """New flat tensors of at least the sizes of `ws`, each at a multiple of 16 bytes."""
    sizes = [-(-w.numel() // 4) * 4 for w in ws]
    return ws[0].new_empty(sum(sizes)).split(sizes)


def _written(weights: Shards) -> None:
    """Tell autograd, which sees no write of a kernel."""
    for w in weights:
        torch.autograd.graph.increment_version(w)
