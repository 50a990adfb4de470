"""A tree of image files: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg."""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import exp, log, sqrt
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, RunError
from .augment import Augment, flips
from .decode import Box, square
from .draws import CROP, uniform
from .randaugment import randaugment, randaugment_draws

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VAL_NAMES = ("val", "validation", "test")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_EVAL_SHARE = 0.875  # of the shorter side that the centre crop keeps
_TRIES = 10  # of a random region to fit into the picture
_MOST_FAILURES = 100  # unreadable files in a row after which the disk is to blame


class Folder:
    """One split of an image tree; see source.Source. Files are read when they are asked for."""

    parallel = True

    def __init__(
        self,
        root: Path,
        class_names: tuple[str, ...],
        files: Sequence[np.ndarray],
        *,
        image_size: int,
        augment: Augment,
        seed: int,
        on_corrupt: Callable[[str], None] = warnings.warn,
    ) -> None:
        """files[c] are the sorted file names, bytes, of class c in root/class_names[c].

        on_corrupt gets one sentence for every unreadable file, the first time it is met.
        """
        self.root = root
        self.class_names = class_names
        self.shape = (3, image_size, image_size)
        self.mean: tuple[float, ...] = IMAGENET_MEAN
        self.std: tuple[float, ...] = IMAGENET_STD
        self.augment = augment
        self.seed = seed
        self.on_corrupt = on_corrupt
        counts = torch.tensor([len(names) for names in files])
        self.labels = torch.repeat_interleave(torch.arange(len(files)), counts)
        self._files = files
        self._starts = (counts.cumsum(0) - counts).tolist()
        self._bad: set[str] = set()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def corrupt(self) -> int:
        """How many different files could not be read so far."""
        return len(self._bad)

    def path(self, index: int) -> str:
        """The file of a sample."""
        label = int(self.labels[index])
        name = os.fsdecode(bytes(self._files[label][index - self._starts[label]]))
        return os.path.join(self.root, self.class_names[label], name)

    def fetch(self, indices: Tensor, keys: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        """See source.Source.fetch. A sample whose file is unreadable is replaced by the next index.

        RunError if 100 files in a row are unreadable.
        """
        channels, side, _ = self.shape
        images = np.empty((len(indices), side, side, channels), dtype=np.uint8)
        used = torch.empty_like(indices)
        for i, (index, change) in enumerate(zip(indices.tolist(), self._changes(keys, train))):
            used[i], picture = self._read(index, change.region)
            images[i] = np.asarray(change.finish(picture))
        return torch.from_numpy(images).permute(0, 3, 1, 2), self.labels[used]

    def _changes(self, keys: Tensor, train: bool) -> list["_Change"]:
        if not train:
            return [_Change() for _ in keys]
        augment = self.augment
        crops: list[list[float] | None] = [None] * len(keys)
        flipped: list[bool | None] = [None] * len(keys)
        operations: list[list[float] | None] = [None] * len(keys)
        if augment.crop:
            draws = uniform(self.seed, keys[:, None], CROP + torch.arange(2 * _TRIES + 2))
            crops = list(draws.tolist())
        if augment.flip:
            flipped = list(flips(self.seed, keys).tolist())
        if augment.ops:
            operations = list(randaugment_draws(self.seed, keys, augment.ops))
        rows = zip(crops, flipped, operations)
        return [_Change(*row, magnitude=augment.magnitude) for row in rows]

    def _read(self, index: int, region: Callable[[int, int], Box]) -> tuple[int, Image.Image]:
        """The sample, or the next one that can be read: its index and its picture."""
        for step in range(_MOST_FAILURES):
            candidate = (index + step) % len(self)
            path = self.path(candidate)
            try:
                with open(path, "rb") as file:
                    return candidate, square(file.read(), region, self.shape[1])
            # A damaged file makes decoders raise nearly anything. None of it is silent.
            except Exception as error:
                self._report(path, error)
        raise RunError(
            f"{_MOST_FAILURES} image files in a row cannot be read, the last is {path}; check that "
            f"{self.root} is still there."
        )

    def _report(self, path: str, error: Exception) -> None:
        with self._lock:
            if path in self._bad:
                return
            self._bad.add(path)
        self.on_corrupt(f"cannot read {path} ({error!r}); the next sample takes its place.")


class _Change:
    """What is done to one picture; without draws, what evaluation does."""

    def __init__(
        self,
        crop: list[float] | None = None,
        flip: bool | None = None,
        operations: list[float] | None = None,
        *,
        magnitude: float = 0.0,
    ) -> None:
        self.crop, self.flip, self.operations = crop, flip, operations
        self.magnitude = magnitude

    def region(self, width: int, height: int) -> Box:
        return centre(width, height) if self.crop is None else random(width, height, self.crop)

    def finish(self, picture: Image.Image) -> Image.Image:
        if self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.operations:
            fill = tuple(round(255 * level) for level in IMAGENET_MEAN)
            picture = randaugment(picture, self.operations, magnitude=self.magnitude, fill=fill)
        return picture


def centre(width: int, height: int) -> Box:
    """The middle square whose side is 0.875 of the shorter side."""
    side = _EVAL_SHARE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random(width: int, height: int, draws: Sequence[float]) -> Box:
    """A region of 8 to 100 % of the area and sides 3:4 to 4:3, from 22 numbers in [0, 1).

    Inception's crop: up to 10 tries to fit one in, else the largest middle region whose sides are
    within those ratios. Returns whole pixels.
    """
    for area, ratio in zip(draws[2::2], draws[3::2]):
        size = width * height * (0.08 + 0.92 * area)
        aspect = exp(log(3 / 4) + ratio * (log(4 / 3) - log(3 / 4)))
        w, h = round(sqrt(size * aspect)), round(sqrt(size / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(draws[0] * (width - w + 1))
            top = int(draws[1] * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def folder(
    data_dir: str | Path | None, *, image_size: int, augment: Augment, seed: int
) -> tuple[Folder, Folder]:
    """Scans DIR/train and DIR/val (or validation, or test). ConfigError if the tree is not one."""
    if not data_dir:
        raise ConfigError(
            "--data folder needs --data_dir, got none; name a folder that holds train/CLASS/*.jpg "
            "and val/CLASS/*.jpg."
        )
    root = Path(data_dir)
    if not root.is_dir():
        raise ConfigError(f"--data_dir '{root}' is not a folder; name one with train/ and val/.")
    if image_size < 1:
        raise ConfigError(f"image_size must be at least 1, got {image_size}; 224 is usual.")
    if not (root / "train").is_dir():
        raise ConfigError(f"--data_dir '{root}' has no folder train; put train/CLASS/*.jpg there.")
    val = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    if val is None:
        raise ConfigError(
            f"--data_dir '{root}' has no folder {', '.join(VAL_NAMES[:-1])} or {VAL_NAMES[-1]}; "
            "put val/CLASS/*.jpg there."
        )
    trained, tested = _scan(root / "train"), _scan(val)
    unknown = sorted(set(tested) - set(trained))
    if unknown:
        raise ConfigError(
            f"class '{unknown[0]}' is in {val} but not in {root / 'train'}; "
            "val may only hold classes that train has."
        )
    names = tuple(trained)
    none = np.empty(0, dtype=bytes)
    files = [tested.get(name, none) for name in names]
    options = {"image_size": image_size, "augment": augment, "seed": seed}
    train = Folder(root / "train", names, list(trained.values()), **options)  # type: ignore[arg-type]
    return train, Folder(val, names, files, **options)  # type: ignore[arg-type]


def _scan(split: Path) -> dict[str, np.ndarray]:
    """Sorted image file names, as bytes (28 bytes a file instead of 80), of every class folder."""
    with os.scandir(split) as entries:
        classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise ConfigError(f"{split} has no class folders; put images into {split}/CLASS/.")
    with ThreadPoolExecutor(16) as pool:  # a network file system answers many at once
        found = list(pool.map(lambda name: _images(split / name), classes))
    for name, files in zip(classes, found):
        if not len(files):
            raise ConfigError(
                f"class folder {split / name} holds no image ({', '.join(SUFFIXES)}); "
                "add images or remove the folder."
            )
    return dict(zip(classes, found))


def _images(folder: Path) -> np.ndarray:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.name[0] != "."]
    return np.sort(np.array([os.fsencode(name) for name in names], dtype=bytes))
