"""Random erasing (Zhong et al. 2017, arXiv:1708.04896): a box of noise, as timm's mode "pixel".

On the device, after normalisation and before mixing, as in DeiT.
"""

from math import log, sqrt

import torch
from torch import Tensor

from .draws import ERASE, NOISE, uniform

_AREA = (0.02, 1 / 3)  # of the box, as a share of the image's
_ASPECT = 0.3  # height / width is between this and 1 / this, log-uniform
_TRIES = 10  # to fit a box into the image


def draw(probability: float, seed: int, keys: Tensor, *, height: int, width: int) -> Tensor:
    """The box that is erased in each sample, int64 [n, 4]: top, left, bottom, right in pixels,
    bottom and right not included; (0, 0, 0, 0) where none is."""
    draws = uniform(seed, keys[:, None], ERASE + torch.arange(3 + 2 * _TRIES))
    area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * draws[:, 3::2])
    aspect = (log(_ASPECT) * (1 - 2 * draws[:, 4::2])).exp()
    h, w = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (h < height) & (w < width)
    first = fits.byte().argmax(1, keepdim=True)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    top = (draws[:, 1] * (height - h + 1)).long()
    left = (draws[:, 2] * (width - w + 1)).long()
    done = (draws[:, 0] < probability) & fits.any(1)
    return torch.stack([top, left, top + h, left + w], 1) * done[:, None]


def num_pixels(boxes: Tensor) -> int:
    """The pixels of all boxes together."""
    return int(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum())


def erase_(images: Tensor, boxes: Tensor, seed: int, keys: Tensor, *, pixels: int) -> None:
    """Fills the boxes of normalised images [n, C, H, W] with normal noise, on their device.

    The noise of a pixel and channel depends on the seed, the sample's key and its place alone.
    pixels: `num_pixels(boxes)`.
    """
    channels, _, width = images.shape[1:]
    top, left, bottom, right = boxes.unbind(1)
    counts = (bottom - top) * (right - left)
    samples = torch.arange(len(images), device=images.device)
    sample = samples.repeat_interleave(counts, output_size=pixels)
    within = torch.arange(pixels, device=images.device) - (counts.cumsum(0) - counts)[sample]
    columns = (right - left)[sample]
    row, column = top[sample] + within // columns, left[sample] + within % columns
    places = (row * width + column)[:, None] * channels
    places = places + torch.arange(channels, device=images.device)
    draws = uniform(seed, keys[sample][:, None], NOISE + places) + 2.0**-54  # in (0, 1)
    noise = sqrt(2) * (2 * draws - 1).erfinv()
    images[sample, :, row, column] = noise.to(images.dtype)
