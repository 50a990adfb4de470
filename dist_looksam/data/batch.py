"""A micro-batch: pinned, copied to the device, changed, normalised, erased and mixed there."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import on_device
from .erasing import erase_, num_pixels
from .mixing import mix


@dataclass(frozen=True, kw_only=True)
class Batch:
    """n samples. On the host images are uint8; after `to`, floats, and all augmentation is done."""

    images: Tensor  # [n, C, H, W]: uint8 in 0..255, or float32 after `to`
    labels: Tensor  # int64 [n]
    keys: Tensor  # int64 [n], global sample number: stream position since training began
    mean: tuple[float, ...]  # [C], of images scaled to 0..1
    std: tuple[float, ...]  # [C]
    partner: Tensor | None = None  # int64 [n], the partner's label; None: no mixing
    lam: Tensor | None = None  # float32 [n], the share of the own label
    boxes: Tensor | None = None  # int64 [n, 4], see mixing.draw
    erased: Tensor | None = None  # int64 [n, 4], see erasing.draw; None: no erasing
    seed: int = 0  # of the noise in erased boxes
    kinds: Tensor | None = None  # these three: see on_device.change
    numbers: Tensor | None = None
    fill: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def pin(self) -> "Batch":
        """The batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> "Batch":
        """A batch on `device`, images float32: changed by policy and jitter where that is done
        there, normalised, erased, then mixed, in this order as in DeiT; this one is not changed.

        Deterministic, so both passes of a look may call it, or share one result. Copies do not
        block the host if the batch is pinned. A batch whose images are floats is only copied.
        """
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        if self.images.dtype != torch.uint8:
            return moved
        mean, std = _per_channel(self.mean, self.std, moved.images.device)
        if self.kinds is not None and moved.numbers is not None:
            done = on_device.Operations(self.kinds, moved.numbers)  # kinds are read on the host
            levels = on_device.change(moved.images, done, self.fill)
        else:
            levels = moved.images.contiguous()
        images = (levels.float().div_(255) - mean).div_(std)
        if self.erased is not None and moved.erased is not None:
            pixels = num_pixels(self.erased)  # on the host, so that the device need not wait
            erase_(images, moved.erased, self.seed, moved.keys, pixels=pixels)
        if moved.lam is not None and moved.boxes is not None:
            images = mix(images, moved.lam, moved.boxes)
        return replace(moved, images=images)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: function(v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@lru_cache(maxsize=8)
def _per_channel(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Both as [C, 1, 1]. Cached, because making a tensor on a GPU from numbers synchronises."""
    rows = torch.tensor([mean, std], device=device)[:, :, None, None]
    return rows[0], rows[1]
