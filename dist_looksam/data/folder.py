"""A tree of image files: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import exp, log, sqrt
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from ..errors import ConfigError
from .augment import Augment, flips
from .decode import Box, square
from .draws import CROP, uniform
from .randaugment import randaugment, randaugment_draws
from .source import UNREADABLE

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", *([".avif"] if features.check("avif") else [])),
)
VAL_NAMES = ("val", "validation", "test")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_EVAL_SHARE = 0.875  # side of the centre crop / shorter side
_TRIES = 10  # to fit a random region into the picture
_SIZES = 1000  # files of a split whose sizes are in its digest
# Made by file systems, archives and file managers; not classes.
_NO_CLASSES = {"lost+found", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"}


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
        passed_over: dict[str, tuple[int, str]],
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
        self.passed_over = passed_over
        self.unreadable: dict[str, str] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """The file of a sample."""
        label = int(self.labels[index])
        name = os.fsdecode(bytes(self._files[label][index - self._starts[label]]))
        return os.path.join(self.root, self.class_names[label], name)

    def digest(self) -> str:
        """See source.Source.digest: of classes, file names, and the sizes of about 1,000 files."""
        digest = hashlib.sha256(repr((self.class_names, [len(f) for f in self._files])).encode())
        for names in self._files:
            digest.update(names.tobytes())
        some = range(0, len(self), max(1, len(self) // _SIZES))
        with ThreadPoolExecutor(16) as pool:
            digest.update(repr(list(pool.map(self._size, some))).encode())
        return digest.hexdigest()

    def _size(self, index: int) -> int:
        try:
            return os.stat(self.path(index)).st_size
        except OSError:
            return -1  # `fetch` reports it

    def fetch(self, indices: Tensor, keys: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        channels, side, _ = self.shape
        images = np.empty((len(indices), side, side, channels), dtype=np.uint8)
        labels = self.labels[indices]
        for i, (index, change) in enumerate(zip(indices.tolist(), self._changes(keys, train))):
            picture = self._read(index, change.region)
            if picture is None:
                labels[i] = UNREADABLE
            else:
                images[i] = np.asarray(change.finish(picture))
        return torch.from_numpy(images).permute(0, 3, 1, 2), labels

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

    def _read(self, index: int, region: Callable[[int, int], Box]) -> Image.Image | None:
        path = self.path(index)
        try:
            with open(path, "rb") as file:
                return square(file.read(), region, self.shape[1])
        except Exception as error:  # decoders raise nearly anything for a damaged file
            why = "no image" if isinstance(error, UnidentifiedImageError) else repr(error)
            with self._lock:
                known = path in self.unreadable
                self.unreadable[path] = why
            if not known:
                self.on_corrupt(f"cannot read {path} ({why}).")
            return None


@dataclass
class _Change:
    """The transformation of one picture, by its draws; without draws, that of evaluation."""

    crop: list[float] | None = None
    flip: bool | None = None
    operations: list[float] | None = None
    magnitude: float = 0.0

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
    """Scans DIR/train and DIR/val (or validation, or test). ConfigError for a malformed tree."""
    if not data_dir:
        raise ConfigError(
            "--data folder needs --data_dir, got none; name a folder that holds train/CLASS/*.jpg "
            "and val/CLASS/*.jpg."
        )
    if image_size < 1:
        raise ConfigError(f"image_size must be at least 1, got {image_size}; 224 is usual.")
    root = Path(data_dir)
    try:
        val = _val_of(root)
        train_files, train_over = _scan(root / "train")
        val_files, val_over = _scan(val)
    except OSError as error:
        raise ConfigError(
            f"--data_dir must be a tree that can be read, got {error.filename or root} "
            f"({error.strerror}); correct its permissions or take it out."
        ) from None
    if len(train_files) < 2:
        raise ConfigError(
            f"{root / 'train'} must hold two class folders or more, got only '{min(train_files)}', "
            f"of which every guess is right; put the images of each class into a folder of its own."
        )
    unknown = sorted(set(val_files) - set(train_files))
    if unknown:
        raise ConfigError(
            f"class '{unknown[0]}' is in {val} but not in {root / 'train'}; "
            "val may only hold classes that train has."
        )
    names = tuple(train_files)
    files = [val_files.get(name, np.empty(0, dtype=bytes)) for name in names]
    options: dict[str, Any] = {"image_size": image_size, "augment": augment, "seed": seed}
    train = Folder(
        root / "train", names, [*train_files.values()], passed_over=train_over, **options
    )
    return train, Folder(val, names, files, passed_over=val_over, **options)


def _val_of(root: Path) -> Path:
    """The folder of test images. ConfigError if it, or the one of training images, is not there."""
    if not root.is_dir():
        raise ConfigError(f"--data_dir '{root}' is not a folder; name one with train/ and val/.")
    if not (root / "train").is_dir():
        raise ConfigError(f"--data_dir '{root}' has no folder train; put train/CLASS/*.jpg there.")
    val = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    if val is None:
        raise ConfigError(
            f"--data_dir '{root}' has no folder {', '.join(VAL_NAMES[:-1])} or {VAL_NAMES[-1]}; "
            "put val/CLASS/*.jpg there."
        )
    return val


class _PassedOver(dict[str, tuple[int, str]]):
    """See source.Source.passed_over."""

    def add(self, why: str, path: str, count: int = 1) -> None:
        number, first = self.get(why, (0, path))
        self[why] = number + count, first


def _scan(split: Path) -> tuple[dict[str, np.ndarray], _PassedOver]:
    """Sorted image file names, as bytes (28 bytes a file instead of 80), of every class folder; and
    the files passed over. ConfigError for a class without images, OSError if one is not readable.
    """
    over = _PassedOver()
    with os.scandir(split) as entries:
        classes = sorted(e.name for e in entries if _is_class(e, over))
    if not classes:
        raise ConfigError(f"{split} has no class folders; put images into {split}/CLASS/.")
    with ThreadPoolExecutor(16) as pool:  # a network file system answers many at once
        scanned = list(pool.map(lambda name: _images(split / name), classes))
    for name, (files, others) in zip(classes, scanned):
        for why, (count, first) in others.items():
            over.add(why, first, count)
        if not len(files):
            raise ConfigError(
                f"class folder {split / name} holds no image ({', '.join(SUFFIXES)}); "
                "add images or remove the folder."
            )
    return {name: files for name, (files, _) in zip(classes, scanned)}, over


def _is_class(entry: os.DirEntry[str], over: _PassedOver) -> bool:
    if entry.name.startswith("."):
        over.add("hidden", entry.path)
    elif entry.name in _NO_CLASSES:
        over.add("made by the file system", entry.path)
    elif os.path.isdir(entry.path):
        return True
    elif os.path.exists(entry.path):
        over.add("files beside the class folders", entry.path)
    else:
        raise ConfigError(
            f"class folder {entry.path} must be a folder, got a link to nothing; correct the link "
            f"or remove it."
        )
    return False


def _images(folder: Path) -> tuple[np.ndarray, _PassedOver]:
    over = _PassedOver()
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            why = _no_image(entry)
            if why:
                over.add(why, entry.path)
            else:
                names.append(os.fsencode(entry.name))
    return np.sort(np.array(names, dtype=bytes)), over


def _no_image(entry: os.DirEntry[str]) -> str:
    """Why the entry is passed over; "" for an image. Stats only links and special files."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir(follow_symlinks=False):
        return "folders inside a class"
    if not entry.name.lower().endswith(SUFFIXES):
        return "no images by their names"
    if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path):
        return ""
    return "links to nothing" if not os.path.exists(entry.path) else "no files"
