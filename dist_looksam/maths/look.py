"""Which gradient the base optimizer gets: LookSAM's decomposition and reuse, GSAM's combination.

g    gradient at w.            g_s   gradient at w + eps, over the same samples.
g_h  the part of g_s along g.  g_v   the part of g_s orthogonal to g.

Sources: LookSAM: Liu et al., arXiv:2203.02714, Algorithm 1. GSAM: Zhuang et al., arXiv:2203.08065,
Algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from .shards import Reduce, Scope, Shards, dots, products, ratio, scalars


@dataclass(frozen=True, kw_only=True)
class Update:
    """The gradient passed to the base optimizer, as numbers per layer; and how it is written.

    x is the gradient of the last pass, y is g on a look and the stored g_v in other steps.

    last            [P] float64, or None for 1. The base gets scale (last x + kept y).
    kept            [P] float64, or None where y is not used.
    new_kept        [P] float64. On a look, g_v = x + new_kept y; None in other steps.
    scale           0-dim float64, the clipping: everything is multiplied by it once.
    grad_sq_norm    0-dim float64, ||g||^2.
    update_sq_norm  0-dim float64, its squared norm before clipping.
    gv_sq_norm      0-dim float64, ||g_v||^2; 0 where there is none, NaN where not yet known.
    finite          0-dim bool: false where any entry of either gradient is NaN or infinite.

    `layers` of a method: see `scalars`.
    """

    last: Tensor | None = None
    kept: Tensor | None = None
    new_kept: Tensor | None = None
    scale: Tensor
    grad_sq_norm: Tensor
    update_sq_norm: Tensor
    gv_sq_norm: Tensor
    finite: Tensor

    def along(self, grads: Shards) -> list[Tensor]:
        """g_h on a look, the part of g_s along g; new tensors."""
        assert self.new_kept is not None
        return [g * -size for g, size in zip(grads, scalars(self.new_kept, grads), strict=True)]

    def combine_(self, xs: Shards, ys: Shards, *, layers: Sequence[int] | None = None) -> None:
        """xs become last x + kept y; on a look, ys become g_v."""
        if kernel := kernels.fit(xs, ys):
            columns = {"last": self.last, "kept": self.kept, "new_kept": self.new_kept}
            kernel.combine_(xs, ys, **columns, layers=layers)
            return
        lasts, kepts, news = (
            [None] * len(xs) if column is None else scalars(column, xs, layers)
            for column in (self.last, self.kept, self.new_kept)
        )
        for x, y, last, kept, new in zip(xs, ys, lasts, kepts, news, strict=True):
            in_place = last is None and kept is None
            gv = None if new is None else torch.addcmul(x, y, new, out=y if in_place else None)
            if last is not None:
                x.mul_(last)
            if kept is not None:
                x.addcmul_(y, kept)
            if gv is not None and gv is not y:
                y.copy_(gv)

    def clip_(self, grads: Shards) -> None:
        """grads *= scale, by one kernel for each device and dtype."""
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for g in grads:
            by_kind.setdefault((g.device, g.dtype), []).append(g)
        for kind, same in by_kind.items():
            torch._foreach_mul_(same, self.scale.to(*kind))


def _update(
    *, clip: float | None, update_sq_norm: Tensor, grad_sq_norm: Tensor, **rest: Tensor
) -> Update:
    return Update(
        scale=clip_scale(update_sq_norm, clip),
        update_sq_norm=update_sq_norm,
        grad_sq_norm=grad_sq_norm,
        finite=torch.isfinite(grad_sq_norm + update_sq_norm),  # neither is negative
        **rest,
    )


def clip_scale(sq_norm: Tensor, clip: float | None) -> Tensor:
    """min(1, clip / norm): the factor that limits a norm to `clip`. 1 without a limit."""
    if clip is None:
        return torch.ones_like(sq_norm)
    return torch.full_like(sq_norm, clip) / sq_norm.sqrt().clamp(min=clip)


def plain(grads: Shards, *, clip: float | None, reduce: Reduce) -> Update:
    """The base gets g itself. One call of reduce, [P]."""
    grad_sq_norms = reduce(dots(grads, grads))
    total = grad_sq_norms.sum()
    return _update(
        clip=clip,
        grad_sq_norm=total,
        update_sq_norm=total,
        gv_sq_norm=torch.zeros_like(total),
    )


def learn(
    sam: Shards, grads: Shards, *, scope: Scope, clip: float | None, reduce: Reduce
) -> Update:
    """A look: the base gets g_s, and g_v = g_s - (<g_s, g> / <g, g>) g is what to remember.

    One call of reduce, [3, P]. ||g_v|| is left to be summed from g_v itself: as a difference of
    sums it would be rounding noise when rho is small.
    """
    product, grad_sq_norms, sam_sq_norms = _look_sums(sam, grads, reduce)
    total = sam_sq_norms.sum()
    return _update(
        new_kept=-ratio(scope(product), scope(grad_sq_norms), otherwise=0.0),
        clip=clip,
        grad_sq_norm=grad_sq_norms.sum(),
        update_sq_norm=total,
        gv_sq_norm=torch.full_like(total, torch.nan),
    )


def gap(
    sam: Shards,
    grads: Shards,
    *,
    alpha: Tensor | float,
    scope: Scope,
    clip: float | None,
    reduce: Reduce,
) -> Update:
    """A look of GSAM: the base gets g_s - alpha (g - (<g, g_s> / <g_s, g_s>) g_s).

    The bracket is the part of g orthogonal to g_s. To descend against it lowers the surrogate gap,
    loss(w + eps) - loss(w), and to first order leaves loss(w + eps) unchanged. Where g_s is 0 the
    base gets 0. One call of reduce, [3, P].
    """
    product, grad_sq_norms, sam_sq_norms = _look_sums(sam, grads, reduce)
    shared = scope(sam_sq_norms)
    kept = torch.where(shared == 0, 0.0, -alpha * torch.ones_like(shared))
    last = 1 - kept * ratio(scope(product), shared, otherwise=0.0)
    sq_norms = last * last * sam_sq_norms + 2 * last * kept * product + kept * kept * grad_sq_norms
    total = sq_norms.sum().clamp(min=0)
    return _update(
        last=last,
        kept=kept,
        new_kept=-ratio(scope(product), scope(grad_sq_norms), otherwise=0.0),
        clip=clip,
        grad_sq_norm=grad_sq_norms.sum(),
        update_sq_norm=total,
        gv_sq_norm=torch.full_like(total, torch.nan),
    )


def _look_sums(sam: Shards, grads: Shards, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """True sums, [P] each, of <g_s, g>, <g, g> and <g_s, g_s>."""
    # alike: where g_s is g, as at rho = 0, the ratio is exactly 1 and g_v exactly 0; reuse would
    # enlarge a rounding error.
    sums = reduce(products((sam, sam), (sam, grads), (grads, grads), alike=True))
    return sums[1], sums[2], sums[0]


def reuse(
    grads: Shards,
    gv: Shards,
    *,
    alpha: Tensor | float,
    natural: bool = False,
    scope: Scope,
    clip: float | None,
    reduce: Reduce,
) -> Update:
    """Between looks: the base gets g + size g_v, size = alpha ||g|| / ||g_v||, or alpha if natural.

    A g_v of zero adds nothing. One call of reduce, [3, P].
    """
    sums = reduce(products((grads, grads), (grads, gv), (gv, gv)))
    g2, product, v2 = sums
    if natural:
        size = torch.ones_like(g2) * alpha
    else:
        shared_g2, _, shared_v2 = scope(sums)
        size = alpha * ratio(shared_g2, shared_v2, otherwise=0.0).sqrt()
    total_g2, _, total_v2 = sums.sum(-1)
    update_sq_norms = torch.addcmul(g2, size, torch.addcmul(2 * product, size, v2))
    return _update(
        kept=size,
        clip=clip,
        grad_sq_norm=total_g2,
        update_sq_norm=update_sq_norms.sum().clamp(min=0),
        gv_sq_norm=total_v2,
    )
