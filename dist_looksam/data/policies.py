"""What is done to an image after crop and flip: one policy, then colour jitter. On PIL images."""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from .augment import Augment
from .draws import JITTER, THREE, TRIVIAL, uniform
from .randaugment import OPERATIONS, Fill, Operation, randaugment, randaugment_draws

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
_COLOURS = ("brightness_times", "contrast_times", "color_times")
OTHERS: dict[str, Operation] = {  # the strength is a radius or a factor
    "grey": lambda image, strength, fill: image.convert("L").convert(image.mode),
    "blur": lambda image, radius, fill: image.filter(ImageFilter.GaussianBlur(radius)),
    "brightness_times": lambda image, s, fill: ImageEnhance.Brightness(image).enhance(s),
    "contrast_times": lambda image, s, fill: ImageEnhance.Contrast(image).enhance(s),
    "color_times": lambda image, s, fill: ImageEnhance.Color(image).enhance(s),
}
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


def steps(numbers: Sequence[float], augment: Augment) -> list[tuple[str, float]]:
    """What is done to an image by these draws, in order: operation and strength."""
    end = len(numbers) - _JITTERS * bool(augment.jitter)
    policy, colours = numbers[:end], numbers[end:]
    done: list[tuple[str, float]] = []
    if augment.ops:
        done = randaugment(policy, magnitude=augment.magnitude)
    elif augment.trivial:
        done = [_trivialaugment(policy)]
    elif augment.three:
        done = [_three_augment(policy)]
    return done + (_jitter(colours, augment.jitter) if augment.jitter else [])


def change(
    image: Image.Image, numbers: Sequence[float], augment: Augment, *, fill: Fill
) -> Image.Image:
    """An RGB or L image after the policy and the colour jitter of `augment`, by these draws."""
    return apply(image, steps(numbers, augment), fill)


def apply(image: Image.Image, done: Sequence[tuple[str, float]], fill: Fill) -> Image.Image:
    """The image after `steps`."""
    for name, strength in done:
        image = (OPERATIONS.get(name) or OTHERS[name])(image, strength, fill)
    return image


def _trivialaugment(draws: Sequence[float]) -> tuple[str, float]:
    """One operation of RandAugment, with a random strength. draws: operation, strength, sign."""
    name = tuple(OPERATIONS)[int(draws[0] * len(OPERATIONS))]
    strength = _WIDEST[name] * int(draws[1] * _STRENGTHS) / (_STRENGTHS - 1)
    return name, strength if draws[2] < 0.5 else -strength


def _three_augment(draws: Sequence[float]) -> tuple[str, float]:
    """3-Augment (Touvron et al. 2022, DeiT III, arXiv:2204.07118): grey, solarized or blurred.

    draws: which of the three, the radius of the blur.
    """
    low, high = _BLUR
    blur = ("blur", low + (high - low) * draws[1])
    return (("grey", 0.0), ("solarize", 0.5), blur)[int(3 * draws[0])]


def _jitter(draws: Sequence[float], share: float) -> list[tuple[str, float]]:
    """Brightness, contrast and saturation times 1 - share to 1 + share each, in random order.

    draws: the three factors, the order. As torchvision's ColorJitter.
    """
    order = _ORDERS[int(draws[-1] * len(_ORDERS))]
    return [(_COLOURS[kind], 1 - share + 2 * share * draws[kind]) for kind in order]


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
