"""A tree of image files: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from .augment import Augment
from .pictures import SUFFIXES, VAL_NAMES, Pictures

_SIZES = 1000  # files of a split whose sizes are in its digest
# Made by file systems, archives and file managers; not classes.
_NO_CLASSES = {"lost+found", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"}


class Folder(Pictures):
    """One split of an image tree."""

    def __init__(
        self, root: Path, class_names: tuple[str, ...], files: Sequence[np.ndarray], **how: Any
    ) -> None:
        """files[c] are the sorted file names, bytes, of class c in root/class_names[c]. The rest is
        as of `Pictures`."""
        counts = torch.tensor([len(names) for names in files])
        super().__init__(
            class_names, torch.repeat_interleave(torch.arange(len(files)), counts), **how
        )
        self.root = root
        self._files = files
        self._starts = (counts.cumsum(0) - counts).tolist()
        self._folders = [os.fsencode(os.path.join(root, name, "")) for name in class_names]

    def path(self, index: int) -> str:
        """The file of a sample."""
        label = bisect_right(self._starts, index) - 1  # faster than to read one item of a tensor
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

    def encoded(self, index: int) -> bytes:
        label = bisect_right(self._starts, index) - 1
        name = bytes(self._files[label][index - self._starts[label]])
        file = os.open(self._folders[label] + name, os.O_RDONLY)  # open() takes 25 us longer
        try:
            size = os.fstat(file).st_size
            parts = [os.read(file, size)]
            while parts[-1] and sum(map(len, parts)) < size:  # a network disk may give less at once
                parts.append(os.read(file, size))
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            os.close(file)


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
