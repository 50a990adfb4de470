"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719) on PIL images: its 14 operations."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from .draws import RANDAUGMENT, uniform

Fill = int | tuple[int, ...]
# image, strength in [-1, 1], colour of what comes in from outside the picture
Operation = Callable[[Image.Image, float, Fill], Image.Image]


def _warp(
    image: Image.Image, fill: Fill, row_x: Sequence[float], row_y: Sequence[float]
) -> Image.Image:
    """Output pixel (x, y) is input pixel (row_x . (x, y, 1), row_y . (x, y, 1))."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (*row_x, *row_y),
        Image.Resampling.BILINEAR,
        fillcolor=fill,
    )


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, strength, fill: kind(image).enhance(1 + 0.9 * strength)


# The ranges are the paper's; magnitude 10 is strength 1. A sign is drawn for all; where only the
# size counts, abs() drops it.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, strength, fill: image,
    "auto_contrast": lambda image, strength, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, fill: ImageOps.equalize(image),
    "rotate": lambda image, strength, fill: image.rotate(
        30 * strength, Image.Resampling.BILINEAR, fillcolor=fill
    ),
    "solarize": lambda image, strength, fill: ImageOps.solarize(
        image, round(256 - 256 * abs(strength))
    ),
    "color": _enhance(ImageEnhance.Color),
    "posterize": lambda image, strength, fill: ImageOps.posterize(
        image, 8 - round(4 * abs(strength))
    ),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, s, fill: _warp(image, fill, (1, 0.3 * s, 0), (0, 1, 0)),
    "shear_y": lambda image, s, fill: _warp(image, fill, (1, 0, 0), (0.3 * s, 1, 0)),
    "translate_x": lambda image, s, fill: _warp(
        image, fill, (1, 0, 0.45 * s * image.width), (0, 1, 0)
    ),
    "translate_y": lambda image, s, fill: _warp(
        image, fill, (1, 0, 0), (0, 1, 0.45 * s * image.height)
    ),
}
_NAMES = tuple(OPERATIONS)


def randaugment_draws(seed: int, keys: Tensor, ops: int) -> list[list[float]]:
    """The numbers that `randaugment` takes, [n] lists of 2 * ops."""
    return uniform(seed, keys[:, None], RANDAUGMENT + torch.arange(2 * ops)).tolist()


def randaugment(draws: Sequence[float], *, magnitude: float) -> list[tuple[str, float]]:
    """len(draws) / 2 operations and their strengths, with `magnitude` 0 to 10.

    The first of two draws chooses the operation, the second its sign.
    """
    return [
        (_NAMES[int(choice * len(_NAMES))], magnitude / 10 if sign < 0.5 else -magnitude / 10)
        for choice, sign in zip(draws[::2], draws[1::2])
    ]
