"""--augment_on device: policy and jitter of a micro-batch, drawn on the host, made on the device.

The draws, the operations and their order are those of policies.py, and so are the pixels.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from . import policies
from .augment import Augment
from .batchwise import BATCHWISE, NUMBERS

Steps = list[tuple[str, float]]  # see policies.steps


class Operations(NamedTuple):
    """The operations on n images, in turns: each image has one in each turn.

    groups   of each turn, (operation, number of images), on the host
    places   int64 [turns, n]: the images, those with the same operation after one another
    numbers  float64 [turns, n, NUMBERS]: see batchwise; of the image at that place
    """

    groups: tuple[tuple[tuple[str, int], ...], ...]
    places: Tensor
    numbers: Tensor


def draw(augment: Augment, seed: int, keys: Tensor, *, height: int, width: int) -> Operations:
    """Those of the samples `keys`, int64 [n]."""
    rows = [policies.steps(numbers, augment) for numbers in policies.draw(augment, seed, keys)]
    return arranged(rows, height, width)


def arranged(rows: Sequence[Steps], height: int, width: int) -> Operations:
    groups, places, numbers = [], [], []
    for turn in zip(*rows, strict=True):
        order = sorted(range(len(rows)), key=lambda n: turn[n][0])
        named = groupby(order, key=lambda n: turn[n][0])
        groups.append(tuple((name, len(list(members))) for name, members in named))
        places.append(order)
        numbers.append([_numbers(turn[n], height, width) for n in order])
    return Operations(
        tuple(groups), torch.tensor(places), torch.tensor(numbers, dtype=torch.float64)
    )


def _numbers(step: tuple[str, float], height: int, width: int) -> tuple[float, ...]:
    name, strength = step
    found = BATCHWISE[name][1](strength, height, width) if name in BATCHWISE else ()
    return (*found, *(NUMBERS - len(found)) * (0.0,))


def change(images: Tensor, done: Operations, fill: tuple[int, ...]) -> Tensor:
    """Images uint8 [n, C, H, W] after these operations, new and without gaps, on their device.

    fill: the level of each channel that comes in from outside. The host waits for nothing.
    """
    images = images.clone(memory_format=torch.contiguous_format)
    outside = _levels(fill, images.device)
    for groups, order, rows in zip(done.groups, done.places, done.numbers, strict=True):
        start = 0
        for name, count in groups:
            part = slice(start, start + count)
            start += count
            if name in BATCHWISE:  # else nothing is done
                operation = BATCHWISE[name][0]
                some = images.index_select(0, order[part])
                images.index_copy_(0, order[part], operation(some, rows[part], outside))
    return images


@lru_cache(maxsize=8)
def _levels(fill: tuple[int, ...], device: torch.device) -> Tensor:
    """Cached, because making a tensor on a GPU from numbers synchronises."""
    return torch.tensor(fill, dtype=torch.uint8, device=device)


def note(device: torch.device) -> str:
    """A sentence for the log: whether small images get Pillow's pixels on this machine."""
    made, host = "policy and jitter are made on the device", f"Pillow {PIL.__version__} on the host"
    if not (far := _difference(device)):
        return f"{made}, with the pixels of {host}"
    return f"warning: {made}, whose pixels differ from those of {host} by up to {far} of 255 levels"


def _difference(device: torch.device) -> int:
    """The most levels by which an operation on a small image differs from Pillow's."""
    rows = [[(name, s)] for name in policies.OPERATIONS for s in (-0.9, 0.25, 0.9)]
    rows += [[(name, s)] for name in policies.OTHERS for s in (0.3, 0.8, 1.7)]
    random = np.random.Generator(np.random.Philox(0))
    levels = random.integers(0, 256, (len(rows), 24, 32, 3)).astype(np.uint8)
    levels[1::2] = levels[1::2] // 4 + 90  # of low contrast
    fill = (124, 116, 104)
    made: Any = [
        np.asarray(policies.apply(Image.fromarray(image), steps, fill))
        for image, steps in zip(levels, rows)
    ]
    done = arranged(rows, *levels.shape[1:3])
    done = Operations(done.groups, done.places.to(device), done.numbers.to(device))
    images = torch.from_numpy(levels).permute(0, 3, 1, 2).to(device)
    found = change(images, done, fill).permute(0, 2, 3, 1).cpu().numpy()
    return int(np.abs(found.astype(int) - np.stack(made)).max())
