"""LAMB's and LARS's trust ratio: how far a layer may move, as a multiple of its update."""

import torch
from torch import Tensor

from .shards import Reduce, Shards, products, ratio


def trust_ratio(weights: Shards, updates: Shards, *, reduce: Reduce) -> Tensor:
    """ratio_i = ||w_i|| / ||u_i||, or 1 where either norm is 0, so that such a layer still learns.

    Args:
        weights, updates: shards of the weights and of the update before the learning rate.
        reduce: one call of [2, P].

    Returns:
        [P] float64, no unit, the same on every rank.

    Source: You et al., arXiv:1904.00962, Algorithm 2, with phi the identity.
    """
    w2, u2 = reduce(products((weights, weights), (updates, updates)))
    return torch.where(w2 == 0, 1.0, ratio(w2, u2, otherwise=1.0).sqrt())
