"""The perturbation eps that is added to the weights before the second gradient.

scope model   eps = rho * sign(g) |g|^(q-1) / (||g||_q^q)^(1/p),  q = p / (p - 1), over all layers.
              Source: Foret et al., arXiv:2010.01412, equation 2. rho g / ||g|| at p = 2.
scope layer   eps_i = rho ||w_i|| g_i / ||g_i||, each layer on its own.
literal       eps_i = rho (||w_i|| / ||g_i||) sign(g_i), as printed in Liu et al., arXiv:2203.02714,
              Algorithm 2. It is not scale-free: it grows as sqrt(size) / ||g_i||.
mask          [P], 1 for layers that are perturbed and 0 for others, whose eps is 0 and whose g
              counts in no norm of the ascent; or one number for all. Source: Mueller et al.,
              arXiv:2306.04226 (SAM-ON).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .. import kernels
from .shards import Reduce, Shards, dots, per_model, products, ratio, scalars


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """eps_i = size_i * direction(g_i).

    size           [P] float64. 0 for a layer that is not perturbed.
    grad_sq_norms  [P] float64, ||g_i||^2, the true sums.
    power          exponent of |g| in the direction: 1 is g itself, 0 is its sign.
    unit           0-dim; |g| is divided by it before the power is taken, against underflow.
    """

    size: Tensor
    grad_sq_norms: Tensor
    power: float = 1.0
    unit: Tensor | None = None

    @property
    def finite(self) -> Tensor:
        """0-dim bool: false where any entry of g is NaN or infinite."""
        return torch.isfinite(self.grad_sq_norms.sum())

    def eps(self, grads: Shards, *, layers: Sequence[int] | None = None) -> Iterator[Tensor]:
        """One at a time, each of its gradient's shape and dtype. `layers`: see `scalars`."""
        for g, size in zip(grads, scalars(self.size, grads, layers), strict=True):
            if self.power == 1.0:
                yield g * size
            elif self.power == 0.0:
                yield g.sign().mul_(size)
            else:
                assert self.unit is not None
                power = (g.abs().double() / self.unit.to(g.device)).pow_(self.power)
                yield power.mul_(size.double()).to(g.dtype).mul_(g.sign())


def perturb_(
    weights: Shards,
    grads: Shards,
    perturbation: Perturbation,
    *,
    layers: Sequence[int] | None = None,
    visible_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """weights += eps.

    Args:
        layers: see `scalars`.
        visible_dtype: dtype in which forward sees the weights, if another.

    Returns:
        With a visible dtype the sums of `perturb_measured_`.
    """
    power = perturbation.power
    if power in (0.0, 1.0) and (kernel := kernels.fit(weights, grads)):
        how = {"sign": power == 0.0, "layers": layers, "visible_dtype": visible_dtype}
        return kernel.perturb_(weights, grads, perturbation.size, **how)
    if visible_dtype is not None:
        return perturb_measured_(weights, perturbation.eps(grads, layers=layers), visible_dtype)
    if power == 1.0:
        sizes = scalars(perturbation.size, grads, layers)
        for w, g, size in zip(weights, grads, sizes, strict=True):
            w.addcmul_(g, size)
    else:
        for w, eps in zip(weights, perturbation.eps(grads, layers=layers), strict=True):
            w.add_(eps)
    return None


_AT_ONCE = 2**21  # entries copied at a time


def perturb_measured_(weights: Shards, eps: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """weights += eps. Returns [3, P]: local sums of (a.eps, a.a, eps.eps), where a is the change of
    the weights rounded to `dtype`."""
    if not weights:
        return torch.zeros(3, 0, dtype=torch.float64)
    remaining, sums = iter(eps), []
    for batch in _batches(weights):
        steps = list(islice(remaining, len(batch)))
        before = _rounded(batch, dtype, steps)
        torch._foreach_add_(batch, steps)
        applied = _rounded(batch, dtype, steps)
        torch._foreach_sub_(applied, before)
        sums.append(products((applied, steps), (applied, applied), (steps, steps)))
    return torch.cat(sums, -1)


def _batches(weights: Shards) -> Iterator[list[Tensor]]:
    """Consecutive layers that have at most _AT_ONCE entries together; a larger one alone."""
    batch: list[Tensor] = []
    size = 0
    for w in weights:
        if batch and size + w.numel() > _AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(w)
        size += w.numel()
    yield batch


def _rounded(weights: Shards, dtype: torch.dtype, like: Shards) -> list[Tensor]:
    """The weights rounded to `dtype`, in the dtypes of `like`."""
    low = [torch.empty_like(w, dtype=dtype) for w in weights]
    rounded = [torch.empty_like(w, dtype=x.dtype) for w, x in zip(weights, like, strict=True)]
    torch._foreach_copy_(low, list(weights))
    torch._foreach_copy_(rounded, low)
    return rounded


def _masked(column: Tensor, mask: Tensor | float) -> Tensor:
    """0 where the mask is 0, also for a column that is not finite there."""
    if isinstance(mask, Tensor):
        return torch.where(mask == 0, 0.0, column)
    return column if mask == 1 else torch.zeros_like(column)


def model_perturbation(
    grads: Shards,
    *,
    rho: Tensor | float,
    p: float = 2.0,
    mask: Tensor | float = 1.0,
    reduce: Reduce,
) -> Perturbation:
    """Ascent over the whole model in the p-norm, p in (1, inf].

    Args:
        grads: shards of g, neither clipped nor scaled.
        rho: radius, in the units of the weights; a number, or [P] one per layer.
        mask: see above.
        reduce: one call of [P] at p = 2 and p = inf, three otherwise.
    """
    grad_sq_norms = reduce(dots(grads, grads))  # on the ranks' device, also with offload
    norm = per_model(_masked(grad_sq_norms, mask)).sqrt()
    if p == 2.0:
        size = _masked(ratio(norm.new_ones(()) * rho, norm, otherwise=0.0), mask)
        return Perturbation(size=size, grad_sq_norms=grad_sq_norms)
    if math.isinf(p):
        size = _masked(torch.where(norm == 0, 0.0, torch.ones_like(norm) * rho), mask)
        return Perturbation(size=size, grad_sq_norms=grad_sq_norms, power=0.0)
    size, power, unit = _p_size(grads, norm, rho, p, mask, reduce)
    return Perturbation(size=size, grad_sq_norms=grad_sq_norms, power=power, unit=unit)


def _p_size(
    grads: Shards,
    norm: Tensor,
    rho: Tensor | float,
    p: float,
    mask: Tensor | float,
    reduce: Reduce,
) -> tuple[Tensor, float, Tensor]:
    """Size, power and unit for any other p.

    |g| is first divided by about its largest entry, so that |g|^q stays in range: the 32-norm is
    between the largest entry and N^(1/32) times it.
    """
    q = p / (p - 1.0)

    def power_sum(unit: Tensor, power: float) -> Tensor:
        local = [(g.abs().double() / unit.to(g.device)).pow_(power).sum() for g in grads]
        return per_model(_masked(reduce(torch.stack(local)), mask))[0]

    first = torch.where(norm[0] == 0, 1.0, norm[0])
    largest = power_sum(first, 32.0).pow(1 / 32) * first
    unit = torch.where(largest == 0, 1.0, largest)
    # eps = rho s^(q-1) / (sum s^q)^(1/p) with s = |g| / unit: the unit cancels, as (q-1) = q/p.
    total = power_sum(unit, q)
    size = _masked(ratio(torch.ones_like(norm) * rho, total.pow(1 / p), otherwise=0.0), mask)
    return size, q - 1.0, unit


def layer_perturbation(
    weights: Shards,
    grads: Shards,
    *,
    rho: Tensor | float,
    literal: bool = False,
    mask: Tensor | float = 1.0,
    reduce: Reduce,
) -> Perturbation:
    """Ascent of every layer on its own, relative to the layer's weights.

    Args:
        weights, grads: shards of w and g, one pair per layer.
        rho: relative radius ||eps_i|| / ||w_i||, no unit; a number, or [P].
        literal: the printed Algorithm 2 (see above) in place of the scale-free rule.
        mask: see above.
        reduce: one call of [2, P].
    """
    weight_sq_norms, grad_sq_norms = reduce(products((weights, weights), (grads, grads)))
    size = _masked(rho * ratio(weight_sq_norms, grad_sq_norms, otherwise=0.0).sqrt(), mask)
    return Perturbation(size=size, grad_sq_norms=grad_sq_norms, power=0.0 if literal else 1.0)


def cosine(sums: Tensor) -> Tensor:
    """Cosine between the applied and the intended perturbation, over the model; 0-dim float64.

    Weights seen in 16 bits round a small eps away; 1 is perfect, and 1 if both are zero.

    Args:
        sums: [3, P] true sums of (applied.eps, applied.applied, eps.eps).
    """
    product, applied_sq, intended_sq = sums.sum(-1)
    norms = (applied_sq * intended_sq).sqrt()
    neither = (intended_sq == 0).double()
    return torch.where(norms == 0, neither, ratio(product, norms, otherwise=0.0))
