"""Where to look: the perturbation eps added to the weights before the second gradient.

scope model   eps = rho * sign(g) |g|^(q-1) / (||g||_q^q)^(1/p),  q = p / (p - 1), over all layers.
              Source: Foret et al., arXiv:2010.01412, equation 2. rho g / ||g|| at p = 2.
scope layer   eps_i = rho ||w_i|| g_i / ||g_i||, each layer on its own.
literal       eps_i = rho (||w_i|| / ||g_i||) sign(g_i), as printed in Liu et al., arXiv:2203.02714,
              Algorithm 2. It is not scale-free: it grows as sqrt(size) / ||g_i||.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .shards import Reduce, Shards, dots, per_model, products, ratio


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """eps_i = size_i * direction(g_i).

    size    [P] float64. 0 for a layer that is not perturbed.
    grad2   [P] float64, ||g_i||^2, the true sums.
    power   exponent of |g| in the direction: 1 is g itself, 0 is its sign.
    unit    0-dim; |g| is divided by it before the power is taken, against underflow.
    """

    size: Tensor
    grad2: Tensor
    power: float = 1.0
    unit: Tensor | None = None
    _cast: dict[tuple, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def _sized(self, layer: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """One layer's size, 0-dim, where and as `like` is; all layers' are cut from one cast, not
        a cast each."""
        kind = (like.device, dtype or like.dtype)
        if kind not in self._cast:
            self._cast[kind] = self.size.to(*kind).unbind()
        return self._cast[kind][layer]

    def add_(self, layer: int, weight: Tensor, grad: Tensor) -> None:
        """weight += eps, in place."""
        if self.power == 1.0:
            weight.addcmul_(grad, self._sized(layer, grad))
        else:
            weight.add_(self.eps(layer, grad))

    def eps(self, layer: int, grad: Tensor) -> Tensor:
        """The perturbation of one layer's shard, of grad's shape and dtype."""
        if self.power == 1.0:
            return grad * self._sized(layer, grad)
        if self.power == 0.0:
            return grad.sign().mul_(self._sized(layer, grad))
        assert self.unit is not None
        steep = (grad.abs().double() / self.unit.to(grad.device)).pow_(self.power)
        steep.mul_(self._sized(layer, grad, torch.float64))
        return steep.to(grad.dtype).mul_(grad.sign())


def model_perturbation(
    grads: Shards, *, rho: Tensor | float, p: float = 2.0, reduce: Reduce
) -> Perturbation:
    """Ascent over the whole model in the p-norm, p in (1, inf].

    Args:
        grads: shards of g, neither clipped nor scaled.
        rho: radius, in the units of the weights; a number, or [P] one per layer.
        reduce: one call of [P] at p = 2 and p = inf, three otherwise.
    """
    grad2 = reduce(dots(grads, grads))  # on the ranks' device; an offloaded shard is on the host
    length = per_model(grad2).sqrt()
    if p == 2.0:
        return Perturbation(
            size=ratio(length.new_ones(()) * rho, length, otherwise=0.0), grad2=grad2
        )
    if math.isinf(p):
        size = torch.where(length == 0, 0.0, torch.ones_like(length) * rho)
        return Perturbation(size=size, grad2=grad2, power=0.0)
    return _climb_p(grads, grad2, length, rho, p, reduce)


def _climb_p(
    grads: Shards, grad2: Tensor, length: Tensor, rho: Tensor | float, p: float, reduce: Reduce
) -> Perturbation:
    """Any other p. |g| is first divided by about its largest entry, so that |g|^q stays in range:
    the 32-norm is between the largest entry and N^(1/32) times it."""
    q = p / (p - 1.0)

    def power_sum(unit: Tensor, power: float) -> Tensor:
        local = [(g.abs().double() / unit.to(g.device)).pow_(power).sum() for g in grads]
        return per_model(reduce(torch.stack(local)))[0]

    first = torch.where(length[0] == 0, 1.0, length[0])
    largest = power_sum(first, 32.0).pow(1 / 32) * first
    unit = torch.where(largest == 0, 1.0, largest)
    # eps = rho s^(q-1) / (sum s^q)^(1/p) with s = |g| / unit: the unit cancels, as (q-1) = q/p.
    total = power_sum(unit, q)
    size = ratio(torch.ones_like(length) * rho, total.pow(1 / p), otherwise=0.0)
    return Perturbation(size=size, grad2=grad2, power=q - 1.0, unit=unit)


def layer_perturbation(
    weights: Shards, grads: Shards, *, rho: Tensor | float, literal: bool = False, reduce: Reduce
) -> Perturbation:
    """Ascent of every layer on its own, relative to the layer's weights.

    Args:
        weights, grads: shards of w and g, one pair per layer.
        rho: relative radius ||eps_i|| / ||w_i||, no unit; a number, or [P].
        literal: the printed Algorithm 2 (see above) in place of the scale-free rule.
        reduce: one call of [2, P].
    """
    weight2, grad2 = reduce(products((weights, weights), (grads, grads)))
    size = rho * ratio(weight2, grad2, otherwise=0.0).sqrt()
    return Perturbation(size=size, grad2=grad2, power=0.0 if literal else 1.0)


def cosine(sums: Tensor) -> Tensor:
    """Cosine between what was added to the weights and eps, over the model; 0-dim float64.

    Weights seen in 16 bits round a small eps away; 1 is perfect, and 1 if both are zero.

    Args:
        sums: [3, P] true sums of (applied.eps, applied.applied, eps.eps).
    """
    along, applied2, intended2 = sums.sum(-1)
    below = (applied2 * intended2).sqrt()
    return torch.where(below == 0, (intended2 == 0).double(), ratio(along, below, otherwise=0.0))
