"""What is done to an image after crop and flip: one policy, then colour jitter. On PIL images."""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from .augment import Augment
from .draws import JITTER, THREE, TRIVIAL, uniform
from .randaugment import OPERATIONS, Fill, randaugment, randaugment_draws

# TrivialAugment (Müller, Hutter 2021, arXiv:2103.10158), its wide ranges as torchvision has them.
# The largest strength of each operation, in units of RandAugment's range; a translation of 32 of
# 224 pixels is one of the same share of any image.
_WIDEST = {name: 1.0 for name in OPERATIONS} | {
    "rotate": 135 / 30, "shear_x": 0.99 / 0.3, "shear_y": 0.99 / 0.3, "posterize": 6 / 4,
    "translate_x": 32 / 224 / 0.45, "translate_y": 32 / 224 / 0.45, "color": 0.99 / 0.9,
    "contrast": 0.99 / 0.9, "brightness": 0.99 / 0.9, "sharpness": 0.99 / 0.9,
}  # fmt: skip
_STRENGTHS = 31  # equally spaced from 0 on
_BLUR = (0.1, 2.0)  # standard deviation in pixels
_COLOURS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_ORDERS = tuple(permutations(range(len(_COLOURS))))
_JITTERS = len(_COLOURS) + 1  # numbers that `jitter` takes


def draw(augment: Augment, seed: int, keys: Tensor) -> list[list[float]]:
    """The numbers that `change` takes, for each of `keys`, int64 [n]."""
    numbers: list[list[float]] = [[] for _ in keys]
    for wanted, first, count in (
        (augment.trivial, TRIVIAL, 3),
        (augment.three, THREE, 2),
        (augment.jitter, JITTER, _JITTERS),
    ):
        if wanted:
            rows = uniform(seed, keys[:, None], first + torch.arange(count)).tolist()
            numbers = [own + more for own, more in zip(numbers, rows)]
    if augment.ops:
        rows = randaugment_draws(seed, keys, augment.ops)
        numbers = [own + more for own, more in zip(rows, numbers)]
    return numbers


def change(
    image: Image.Image, numbers: Sequence[float], augment: Augment, *, fill: Fill
) -> Image.Image:
    """An RGB or L image after the policy and the colour jitter of `augment`, by these draws."""
    end = len(numbers) - _JITTERS * bool(augment.jitter)
    policy, colours = numbers[:end], numbers[end:]
    if augment.ops:
        image = randaugment(image, policy, magnitude=augment.magnitude, fill=fill)
    elif augment.trivial:
        image = trivialaugment(image, policy, fill=fill)
    elif augment.three:
        image = three_augment(image, policy)
    return jitter(image, colours, augment.jitter) if augment.jitter else image


def trivialaugment(image: Image.Image, draws: Sequence[float], *, fill: Fill) -> Image.Image:
    """One operation of RandAugment, with a random strength. draws: operation, strength, sign."""
    name = tuple(OPERATIONS)[int(draws[0] * len(OPERATIONS))]
    strength = _WIDEST[name] * int(draws[1] * _STRENGTHS) / (_STRENGTHS - 1)
    return OPERATIONS[name](image, strength if draws[2] < 0.5 else -strength, fill)


def three_augment(image: Image.Image, draws: Sequence[float]) -> Image.Image:
    """3-Augment (Touvron et al. 2022, DeiT III, arXiv:2204.07118): grey, solarized or blurred.

    draws: which of the three, the radius of the blur.
    """
    choice = int(3 * draws[0])
    if choice == 0:
        return image.convert("L").convert(image.mode)
    if choice == 1:
        return ImageOps.solarize(image, 128)
    low, high = _BLUR
    return image.filter(ImageFilter.GaussianBlur(low + (high - low) * draws[1]))


def jitter(image: Image.Image, draws: Sequence[float], share: float) -> Image.Image:
    """Brightness, contrast and saturation times 1 - share to 1 + share each, in random order.

    draws: the three factors, the order. As torchvision's ColorJitter.
    """
    for kind in _ORDERS[int(draws[-1] * len(_ORDERS))]:
        image = _COLOURS[kind](image).enhance(1 - share + 2 * share * draws[kind])
    return image


def change_batch(images: Tensor, augment: Augment, seed: int, keys: Tensor) -> Tensor:
    """`change` of grey images uint8 [n, 1, H, W]; what comes in from outside of them is 0."""
    numbers = draw(augment, seed, keys)
    if not any(numbers):
        return images
    changed = [
        np.asarray(change(Image.fromarray(pixels), row, augment, fill=0))
        for pixels, row in zip(images[:, 0].numpy(), numbers)
    ]
    return torch.from_numpy(np.stack(changed))[:, None]
