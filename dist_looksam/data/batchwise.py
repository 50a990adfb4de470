"""The operations of policies.py on a batch, on its device, with Pillow's pixels to the bit.

An operation gets images uint8 [n, C, H, W], numbers float64 [n, NUMBERS], a row for each image, and
fill uint8 [C], the colour of what comes in from outside; it returns new images. Their arithmetic is
Pillow's: the same formats and the same order. Each multiplication and addition is a kernel of its
own, because a fused one would round once in place of twice.
"""

from collections.abc import Callable
from math import cos, radians, sin

import numpy as np
import torch
from torch import Tensor

NUMBERS = 6  # as the coefficients of an affine map, the most that an operation takes
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def grey(images: Tensor) -> Tensor:
    """Luma, uint8 [n, 1, H, W]."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().unbind(1)
    luma = (red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16
    return luma.to(torch.uint8)[:, None]


def _of_image(numbers: Tensor) -> Tensor:
    """Each image's first number, [n, 1, 1, 1]."""
    return numbers[:, 0, None, None, None]


def _blend(start: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """start + factor * (images - start), cut off towards 0, in 0..255."""
    start = start.float()
    moved = (images.float() - start).mul_(_of_image(factors).float())
    return moved.add_(start).clamp_(0, 255).to(torch.uint8)


def _brightness(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images[:, :, :1, :1]), images, numbers)


def _contrast(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    levels = grey(images).flatten(1)
    count = levels.shape[1]
    mean = (2 * levels.sum(1, dtype=torch.int64) + count) // (2 * count)  # rounded
    return _blend(mean[:, None, None, None], images, numbers)


def _color(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    return _blend(grey(images), images, numbers)


def _sharpness(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    """The start is a 3 x 3 mean in which the middle counts 5 times; the border stays."""
    smooth = images.clone()
    if min(images.shape[-2:]) >= 3:
        one, five = (float(np.float32(weight) / np.float32(13)) for weight in (1, 5))
        levels = images.float()
        below, own, above = levels[:, :, 2:], levels[:, :, 1:-1], levels[:, :, :-2]
        total = torch.full_like(own[..., 1:-1], 0.5)
        for row, middle in ((below, one), (own, five), (above, one)):
            total = total + (row[..., :-2] * one + row[..., 1:-1] * middle + row[..., 2:] * one)
        smooth[:, :, 1:-1, 1:-1] = total.clamp_(0, 255).to(torch.uint8)
    return _blend(smooth, images, numbers)


def _solarize(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    return torch.where(images < _of_image(numbers).to(torch.int16), images, 255 - images)


def _posterize(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    """numbers: 2 to the power of the bits that are dropped."""
    return images & (256 - _of_image(numbers).to(torch.int16)).to(torch.uint8)


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """table [n, C, 256]: a level for each."""
    levels = table.to(torch.uint8).gather(-1, images.flatten(2).long())
    return levels.view(images.shape)


def _auto_contrast(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    low, high = (edge[..., None].double() for edge in torch.aminmax(images.flatten(2), dim=2))
    range_ = (high - low).clamp(min=1)
    scale = torch.full_like(range_, 255) / range_  # a number / range_ would round twice
    levels = torch.arange(256, device=images.device)
    table = (levels * scale + -low * scale).trunc().clamp(0, 255)
    return _look_up(images, torch.where(high > low, table, levels.double()))


def _equalize(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    pixels = images.flatten(2).long()
    counts = pixels.new_zeros((*pixels.shape[:2], 256))
    counts.scatter_add_(-1, pixels, torch.ones_like(pixels))
    last = counts.gather(-1, pixels.amax(-1, keepdim=True))
    step = (counts.sum(-1, keepdim=True) - last) // 255
    before = counts.cumsum(-1) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    levels = torch.arange(256, device=images.device)
    return _look_up(images, torch.where(step > 0, table, levels))


def _blur(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    """Three box filters along the rows, three along the columns; numbers: see `_taps`.

    32-bit integers that wrap around, shifted as if they had no sign.
    """
    weights = numbers[:, :3].int()[:, :, None, None, None]
    levels = images.int()
    for axis in (3, 2):
        places = torch.arange(-2, images.shape[axis] + 2, device=images.device)
        places = places.clamp(0, images.shape[axis] - 1)
        for _ in range(3):
            wide = levels.index_select(axis, places)
            far, near, middle = (wide.narrow(axis, i, images.shape[axis]) for i in range(3))
            other, end = (wide.narrow(axis, i, images.shape[axis]) for i in (3, 4))
            total = middle * weights[:, 0] + 2**23
            total += (near + other) * weights[:, 1]
            total += (far + end) * weights[:, 2]
            levels = (total >> 24) & 255
    return levels.to(torch.uint8)


def _warp(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    """Output pixel (x, y) is input pixel (a x + b y + c, d x + e y + f), bilinear."""
    channels, height, width = images.shape[1:]
    x = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5
    y = torch.arange(height, device=images.device, dtype=torch.float64)[:, None] + 0.5
    a, b, c, d, e, f = numbers[:, :, None, None].unbind(1)
    column, row = a * x + b * y + c, d * x + e * y + f
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = column - 0.5, row - 0.5
    left, top = column.floor(), row.floor()
    right_share, low_share = (column - left)[:, None], (row - top)[:, None]

    def line(down: int) -> Tensor:
        """Between two neighbours in a row."""
        at = (top.long() + down).clamp(0, height - 1) * width
        found = []
        for aside in (0, 1):
            place = (at + (left.long() + aside).clamp(0, width - 1)).flatten(1)[:, None]
            picked = images.flatten(2).gather(2, place.expand(-1, channels, -1))
            found.append(picked.view(images.shape).double())
        return (found[1] - found[0]) * right_share + found[0]

    upper = line(0)
    levels = (line(1) - upper) * low_share + upper
    return torch.where(inside[:, None], levels.to(torch.uint8), fill[:, None, None])


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """The map of `_warp` around the middle."""
    angle = -radians(degrees % 360.0)
    c, s = round(cos(angle), 15), round(sin(angle), 15)
    x, y = -width / 2, -height / 2
    return c, s, c * x + s * y + 0.0 - x, -s, c, -s * x + c * y + 0.0 - y


def _taps(sigma: float) -> tuple[float, ...]:
    """Weights, in 2^-24, of a pixel and of its neighbours at 1 and at 2 in a box filter, three of
    which are near a Gaussian of `sigma` up to 2 (Gwosdek et al. 2011, doi
    10.1007/978-3-642-24785-9_38)."""
    one = np.float32
    squared = one(sigma) * one(sigma) / one(3)
    length = one(np.sqrt(12.0 * float(squared) + 1.0))
    whole = one(np.floor((float(length) - 1.0) / 2.0))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * squared)
    part /= 6 * (squared - (whole + 1) * (whole + 1))
    radius = whole + part
    inner = int(one(2**24) / (radius * 2 + 1))
    edge = (2**24 - (2 * int(radius) + 1) * inner) // 2
    return (inner, edge, 0) if radius < 1 else (inner, inner, edge)


def _factor(strength: float, height: int, width: int) -> tuple[float, ...]:
    return (1 + 0.9 * strength,)


# Operation of policies.py: what it does to a batch, and its numbers from (strength, H, W).
BATCHWISE: dict[str, tuple[Operation, Callable[[float, int, int], tuple[float, ...]]]] = {
    "auto_contrast": (_auto_contrast, lambda s, h, w: ()),
    "equalize": (_equalize, lambda s, h, w: ()),
    "rotate": (_warp, lambda s, h, w: _rotation(30 * s, h, w)),
    "solarize": (_solarize, lambda s, h, w: (round(256 - 256 * abs(s)),)),
    "color": (_color, _factor),
    "posterize": (_posterize, lambda s, h, w: (2 ** round(4 * abs(s)),)),
    "contrast": (_contrast, _factor),
    "brightness": (_brightness, _factor),
    "sharpness": (_sharpness, _factor),
    "shear_x": (_warp, lambda s, h, w: (1, 0.3 * s, 0, 0, 1, 0)),
    "shear_y": (_warp, lambda s, h, w: (1, 0, 0, 0.3 * s, 1, 0)),
    "translate_x": (_warp, lambda s, h, w: (1, 0, 0.45 * s * w, 0, 1, 0)),
    "translate_y": (_warp, lambda s, h, w: (1, 0, 0, 0, 1, 0.45 * s * h)),
    "grey": (lambda images, numbers, fill: grey(images).expand_as(images), lambda s, h, w: ()),
    "blur": (_blur, lambda s, h, w: _taps(s)),
    "brightness_times": (_brightness, lambda s, h, w: (s,)),
    "contrast_times": (_contrast, lambda s, h, w: (s,)),
    "color_times": (_color, lambda s, h, w: (s,)),
}
