"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) of neighbours in the stream.

Samples 2j and 2j + 1 of the stream are mixed with each other, with one share for both. Pairs are
defined by stream positions: the same for every number of ranks and every even micro-batch.
"""

import torch
from scipy.special import betaincinv
from torch import Tensor

from .augment import Augment
from .draws import MIX, uniform


def swap(x: Tensor) -> Tensor:
    """Every sample's partner: [n, ...] with entries 2j and 2j + 1 exchanged; n is even."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def draw(
    augment: Augment, seed: int, keys: Tensor, *, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """The share of a sample's own label and the box that its partner fills.

    Returns lam float32 [n] in [0, 1] and boxes int64 [n, 4], rows (top, left, bottom, right) in
    pixels, bottom and right not included; (0, 0, 0, 0) where the pair is blended (mixup). With
    both mixup and cutmix on, a fair coin chooses for every pair.
    """
    pairs = keys // 2
    coin, share, y, x = (uniform(seed, pairs, MIX + i) for i in range(4))
    cuts = coin < (0.5 if augment.mixup and augment.cutmix else float(augment.cutmix > 0))
    alpha = torch.where(cuts, augment.cutmix, augment.mixup).double()
    lam = torch.from_numpy(betaincinv(alpha.numpy(), alpha.numpy(), share.numpy()))
    boxes = _boxes((1 - lam).sqrt(), y, x, height=height, width=width) * cuts[:, None]
    top, left, bottom, right = boxes.unbind(1)
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return torch.where(cuts, kept, lam).float(), boxes


def _boxes(side: Tensor, y: Tensor, x: Tensor, *, height: int, width: int) -> Tensor:
    """Boxes of `side` times the image's sides with their middle at (y, x), cut off at the edges."""
    edges = []
    for middle, length in ((y, height), (x, width)):
        extent = (side * length).long()
        low = (middle * length).long() - extent // 2
        edges.append((low.clamp(0, length), (low + extent).clamp(0, length)))
    (top, bottom), (left, right) = edges
    return torch.stack([top, left, bottom, right], 1)


def mix(images: Tensor, lam: Tensor, boxes: Tensor) -> Tensor:
    """Mixes float images [n, C, H, W] with their partners, on their device. Returns a new tensor.

    Without a box: lam * own + (1 - lam) * partner. With a box: partner inside it, own outside.
    """
    rows = torch.arange(images.shape[-2], device=images.device)
    columns = torch.arange(images.shape[-1], device=images.device)
    top, left, bottom, right = (edge[:, None] for edge in boxes.unbind(1))
    inside_rows = (rows >= top) & (rows < bottom)
    inside_columns = (columns >= left) & (columns < right)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    blended = (bottom == top) | (right == left)
    outside = torch.where(blended, lam[:, None], 1.0)[:, :, None]
    own = torch.where(inside, 0.0, outside)[:, None].to(images.dtype)
    return own * images + (1 - own) * swap(images)
