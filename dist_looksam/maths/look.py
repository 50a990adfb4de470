"""LookSAM: pay for the second gradient once in k steps, reuse its new part.

g    gradient at w.            g_s   gradient at w + eps, over the same samples.
g_h  the part of g_s along g.  g_v   the part of g_s orthogonal to g.

Source: Liu et al., arXiv:2203.02714, Algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .shards import Reduce, Scope, Shards, dots, products, ratio, scalars


@dataclass(frozen=True, kw_only=True)
class Update:
    """The gradient passed to the base optimizer, as numbers per layer; and how it is written.

    size            [P] float64. On a look, g_h = size g. Between looks, g + size g_v.
    scale           0-dim float64, the clipping: everything is multiplied by it once.
    grad_sq_norm    0-dim float64, ||g||^2.
    update_sq_norm  0-dim float64, its squared norm before clipping.
    gv_sq_norm      0-dim float64, ||g_v||^2; 0 where there is none, NaN where not yet known.
    finite          0-dim bool: false where any entry of either gradient is NaN or infinite.

    `layers` of a method: see `scalars`.
    """

    size: Tensor
    scale: Tensor
    grad_sq_norm: Tensor
    update_sq_norm: Tensor
    gv_sq_norm: Tensor
    finite: Tensor

    def along(self, grads: Shards) -> list[Tensor]:
        """g_h, new tensors."""
        return [g * size for g, size in zip(grads, scalars(self.size, grads), strict=True)]

    def learn_(self, sam: Shards, grads: Shards, *, layers: Sequence[int] | None = None) -> None:
        """grads, which hold g, become g_v = g_s - size g."""
        for s, g, size in zip(sam, grads, scalars(self.size, grads, layers), strict=True):
            torch.addcmul(s, g, size, value=-1, out=g)

    def reuse_(self, grads: Shards, gv: Shards, *, layers: Sequence[int] | None = None) -> None:
        """grads, which hold g, become g + size g_v."""
        for g, v, size in zip(grads, gv, scalars(self.size, grads, layers), strict=True):
            g.addcmul_(v, size)

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
        finite=torch.isfinite(grad_sq_norm) & torch.isfinite(update_sq_norm),
        **rest,
    )


def clip_scale(sq_norm: Tensor, clip: float | None) -> Tensor:
    """min(1, clip / norm): the factor that limits a norm to `clip`. 1 without a limit."""
    if clip is None:
        return torch.ones_like(sq_norm)
    return ratio(torch.full_like(sq_norm, clip), sq_norm.sqrt(), otherwise=1.0).clamp(max=1.0)


def plain(grads: Shards, *, clip: float | None, reduce: Reduce) -> Update:
    """The base gets g itself. One call of reduce, [P]."""
    grad_sq_norms = reduce(dots(grads, grads))
    total = grad_sq_norms.sum()
    return _update(
        size=torch.zeros_like(grad_sq_norms),
        clip=clip,
        grad_sq_norm=total,
        update_sq_norm=total,
        gv_sq_norm=torch.zeros_like(total),
    )


def learn(
    sam: Shards, grads: Shards, *, scope: Scope, clip: float | None, reduce: Reduce
) -> Update:
    """A look: the base gets g_s, and g_v = g_s - size g is what to remember.

    One call of reduce, [3, P]. ||g_v|| is left to be summed from g_v itself: as a difference of
    sums it would be rounding noise when rho is small.
    """
    # alike: where g_s is g, as at rho = 0, size is exactly 1 and g_v exactly 0; reuse would enlarge
    # a rounding error.
    sums = products((sam, grads), (grads, grads), alike=True)
    product, grad_sq_norms, sam_sq_norms = reduce(torch.cat([sums, dots(sam, sam).unsqueeze(0)]))
    total = sam_sq_norms.sum()
    return _update(
        size=ratio(scope(product), scope(grad_sq_norms), otherwise=0.0),
        clip=clip,
        grad_sq_norm=grad_sq_norms.sum(),
        update_sq_norm=total,
        gv_sq_norm=torch.full_like(total, torch.nan),
    )


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
    g2, product, v2 = reduce(products((grads, grads), (grads, gv), (gv, gv)))
    if natural:
        size = torch.ones_like(g2) * alpha
    else:
        size = alpha * ratio(scope(g2), scope(v2), otherwise=0.0).sqrt()
    return _update(
        size=size,
        clip=clip,
        grad_sq_norm=g2.sum(),
        update_sq_norm=(g2 + 2 * size * product + size * size * v2).sum().clamp(min=0),
        gv_sq_norm=v2.sum(),
    )
