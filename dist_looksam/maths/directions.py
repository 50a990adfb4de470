"""Random directions in the space of weights, the same on every machine and number of ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .shards import Shards, dots, ratio, scalars


def gaussian(like: Shards, *, seed: int) -> list[Tensor]:
    """Independent standard normal entries, in the shapes, dtypes and devices of `like`."""
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=draws).to(x.device, x.dtype) for x in like]


def scaled_to(direction: Shards, norms: Tensor) -> list[Tensor]:
    """Each layer of the direction, scaled to its norm in `norms`, [P] float64."""
    sizes = norms * ratio(torch.ones_like(norms), dots(direction, direction).sqrt(), otherwise=0.0)
    return [d * size for d, size in zip(direction, scalars(sizes, direction), strict=True)]


def filter_normalised(weights: Sequence[Tensor], *, seed: int) -> list[Tensor]:
    """A Gaussian direction in which every filter has the norm of the weights' filter.

    A filter is one index of a layer's first axis, an output channel. Layers of one axis (biases,
    norms) get zeros. Source: Li et al., arXiv:1712.09913, section 4, and their code for biases.
    """
    return [_filters(w, d) for w, d in zip(weights, gaussian(weights, seed=seed), strict=True)]


def _filters(weight: Tensor, direction: Tensor) -> Tensor:
    if weight.ndim < 2:
        return torch.zeros_like(weight)
    wanted, drawn = (x.flatten(1).norm(dim=1) for x in (weight, direction))
    sizes = ratio(wanted, drawn, otherwise=0.0)
    return direction * sizes.view(-1, *[1] * (weight.ndim - 1))
