"""--augment_on device: policy and jitter of a micro-batch, drawn on the host, made on the device.

The draws, the operations and their order are those of policies.py, and so are the pixels.
"""

from collections.abc import Sequence
from functools import lru_cache
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
_NAMES = sorted({*policies.OPERATIONS, *policies.OTHERS})


class Operations(NamedTuple):
    """The operations on n images, one after the other.

    kinds    int64 [n, operations], on the host: places in _NAMES
    numbers  float64 [n, operations, NUMBERS]: see batchwise
    """

    kinds: Tensor
    numbers: Tensor


def draw(augment: Augment, seed: int, keys: Tensor, *, height: int, width: int) -> Operations:
    """Those of the samples `keys`, int64 [n]."""
    rows = [policies.steps(numbers, augment) for numbers in policies.draw(augment, seed, keys)]
    return arranged(rows, height, width)


def arranged(rows: Sequence[Steps], height: int, width: int) -> Operations:
    kinds = [[_NAMES.index(name) for name, _ in steps] for steps in rows]
    numbers = [[_numbers(step, height, width) for step in steps] for steps in rows]
    return Operations(torch.tensor(kinds), torch.tensor(numbers, dtype=torch.float64))


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
    orders = done.kinds.argsort(dim=0, stable=True)  # images with the same operation side by side
    places = _uploaded(orders.T.contiguous(), images.device)
    for turn, (order, place) in enumerate(zip(orders.T, places, strict=True)):
        kinds = done.kinds[order, turn].unique_consecutive(return_counts=True)
        start = 0
        for kind, count in zip(*(found.tolist() for found in kinds), strict=True):
            part, name = place[start : start + count], _NAMES[kind]
            start += count
            if name in BATCHWISE:  # else nothing is done
                operation = BATCHWISE[name][0]
                rows = done.numbers[:, turn].index_select(0, part)
                changed = operation(images.index_select(0, part), rows, outside)
                images.index_copy_(0, part, changed)
    return images


def _uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, by page-locked memory where the host would wait otherwise."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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
    done = done._replace(numbers=done.numbers.to(device))
    images = torch.from_numpy(levels).permute(0, 3, 1, 2).to(device)
    found = change(images, done, fill).permute(0, 2, 3, 1).cpu().numpy()
    return int(np.abs(found.astype(int) - np.stack(made)).max())
