"""Encoded pictures with labels, read one by one and augmented: what folders and tars share."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, log, sqrt
from threading import Lock

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from . import policies
from .augment import Augment, flips
from .decode import Box, address, library, square_into
from .draws import CROP, uniform
from .simple_crop import SimpleCrop
from .source import UNREADABLE

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", *([".avif"] if features.check("avif") else [])),
)
VAL_NAMES = ("val", "validation", "test")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LEAST_ASPECT, _ASPECTS = log(3 / 4), log(4 / 3) - log(3 / 4)
_TRIES = 10  # to fit a random region into the picture


class Pictures:
    """One split; see source.Source. Files are read when they are asked for.

    Subclasses have `path(index)`, a name for messages, `encoded(index)`, the bytes of the file, and
    `digest()`.
    """

    parallel = True
    crop = 0.875  # side of the centre crop / shorter side
    fill = tuple(round(255 * level) for level in IMAGENET_MEAN)

    def __init__(
        self,
        class_names: tuple[str, ...],
        labels: Tensor,
        *,
        image_size: int,
        augment: Augment,
        seed: int,
        passed_over: dict[str, tuple[int, str]],
        on_corrupt: Callable[[str], None] = warnings.warn,
    ) -> None:
        """on_corrupt gets one sentence for every unreadable file, the first time it is met."""
        self.class_names = class_names
        self.labels = labels
        self.shape = (3, image_size, image_size)
        self.mean: tuple[float, ...] = IMAGENET_MEAN
        self.std: tuple[float, ...] = IMAGENET_STD
        self.augment = augment
        self.seed = seed
        self.on_corrupt = on_corrupt
        self.passed_over = passed_over
        self.unreadable: dict[str, str] = {}
        self.decoder = library()
        self.in_c = True  # False: the Python route, with the same pixels
        self._lock = Lock()

    def path(self, index: int) -> str:
        """The file of a sample."""
        raise NotImplementedError

    def encoded(self, index: int) -> bytes:
        """The bytes of a sample's file."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(
        self,
        indices: Tensor,
        keys: Tensor,
        train: bool,
        *,
        changes: Sequence["Change"] | None = None,
        out: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See source.Source.fetch.

        changes  those of `keys`, where they were drawn before: see `changes`
        out      uint8 [n, side, side, 3] without gaps: the memory of the returned images
        """
        channels, side, _ = self.shape
        if out is None:
            out = np.empty((len(indices), side, side, channels), dtype=np.uint8)
        labels = self.labels[indices]
        changes = self.changes(keys, train) if changes is None else changes
        first, size = address(out), out.strides[0]
        for i, (index, change) in enumerate(zip(indices.tolist(), changes)):
            if not self._read(out[i], index, change, first + i * size):
                labels[i] = UNREADABLE
        return torch.from_numpy(out).permute(0, 3, 1, 2), labels

    def changes(self, keys: Tensor, train: bool) -> list["Change"]:
        """The transformations of the samples `keys`, int64 [n]; drawn faster for many at once."""
        if not train:
            return [Change()] * len(keys)
        augment = self.augment.of_host
        crops: list[list[float] | None] = [None] * len(keys)
        flipped: list[bool] = [False] * len(keys)
        if augment.crop or augment.simple:
            count = 2 if augment.simple else 2 * _TRIES + 2
            draws = uniform(self.seed, keys[:, None], CROP + torch.arange(count))
            crops = list(draws.tolist())
        if augment.flip:
            flipped = list(flips(self.seed, keys).tolist())
        rows = zip(crops, flipped, policies.draw(augment, self.seed, keys))
        return [Change(*row, augment=augment) for row in rows]

    def _read(self, out: np.ndarray, index: int, change: "Change", at: int) -> bool:
        try:
            change.write(out, self.encoded(index), in_c=self.in_c, at=at)
            return True
        except Exception as error:  # decoders raise nearly anything for a damaged file
            path = self.path(index)
            why = "no image" if isinstance(error, UnidentifiedImageError) else repr(error)
            with self._lock:
                known = path in self.unreadable
                self.unreadable[path] = why
            if not known:
                self.on_corrupt(f"cannot read {path} ({why}).")
            return False


@dataclass(slots=True)
class Change:
    """The transformation of one picture, by its draws; without draws, that of evaluation."""

    crop: list[float] | None = None
    flip: bool = False
    policy: Sequence[float] = ()  # see policies.draw
    augment: Augment = field(default_factory=Augment)

    def region(self, width: int, height: int) -> Box:
        return centre(width, height) if self.crop is None else random(width, height, self.crop)

    def write(self, out: np.ndarray, data: bytes, *, in_c: bool, at: int | None = None) -> None:
        """Writes the picture of these bytes to `out`, uint8 [side, side, 3]; see `square_into`."""
        if self.augment.simple and self.crop is not None:
            crop = SimpleCrop(len(out), self.crop)
            square_into(out, data, crop.region, mirror=self.flip, in_c=in_c, at=at)
            crop.shift_(out, mirror=self.flip)
        else:
            square_into(out, data, self.region, mirror=self.flip, in_c=in_c, at=at)
        if self.policy:
            picture = Image.fromarray(out)
            picture = policies.change(picture, self.policy, self.augment, fill=Pictures.fill)
            out[:] = np.asarray(picture)


def centre(width: int, height: int, share: float = Pictures.crop) -> Box:
    """The middle square whose side is `share` of the shorter side."""
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random(width: int, height: int, draws: Sequence[float]) -> Box:
    """A region of 8 to 100 % of the area and sides 3:4 to 4:3, from 22 numbers in [0, 1).

    Inception's crop: up to 10 tries to fit one in, else the largest middle region whose sides are
    within those ratios. Returns whole pixels.
    """
    for n in range(2, len(draws), 2):
        size = width * height * (0.08 + 0.92 * draws[n])
        aspect = exp(_LEAST_ASPECT + draws[n + 1] * _ASPECTS)
        w, h = round(sqrt(size * aspect)), round(sqrt(size / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(draws[0] * (width - w + 1))
            top = int(draws[1] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
