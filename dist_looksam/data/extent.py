"""The size of a data set, opened or not, for dry runs."""

import os
from dataclasses import dataclass
from pathlib import Path

from . import load
from .augment import Augment, parse
from .blocks import FULL
from .sets import data_set
from .source import Source
from .subset import Subset, left


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Size of a data set. `shape` is (channels, height, width); `said` names its source.

    image_bytes: mean size of an encoded image, from an index; None: not known. class_names: in the
    order of the logits; () where only the opened data know them.
    """

    samples: int  # in training
    classes: int
    shape: tuple[int, int, int]
    augment: Augment
    said: str
    image_bytes: float | None = None
    class_names: tuple[str, ...] = ()


def is_there(place: str | Path) -> bool:
    """Whether a folder is there; of a pattern like DIR/train-{00..07}.tar, its folder."""
    path = Path(place)
    return os.path.exists(path.parent if "{" in path.name else place)


def extent(
    name: str,
    data_dir: str | Path | None,
    *,
    image_size: int,
    augment: str,
    augment_on: str = "host",
    seed: int = 0,
    holdout: int = 0,
    train_images: int | None = None,
    shuffle: str = FULL,
    opened: bool = True,
) -> Extent:
    """The size of a data set; arguments as of `load`.

    Opens it only if `opened` and a folder is given. A folder that does not exist is replaced by a
    data set of known size, such as ImageNet-1k for images. ConfigError as of `load`.
    """
    row = data_set(name)
    place = f"{name} {data_dir}" if data_dir else name
    absent = bool(row.stands_for) and not is_there(data_dir or "")
    if opened and data_dir and not absent:
        data = load(
            name,
            data_dir,
            image_size=image_size,
            augment=augment,
            augment_on=augment_on,
            seed=seed,
            holdout=holdout,
            train_images=train_images,
            shuffle=shuffle,
        )
        return Extent(
            samples=len(data.train),
            classes=data.num_classes,
            shape=data.shape,
            augment=data.train.augment,
            said=place,
            image_bytes=_image_bytes(data.train),
            class_names=tuple(data.train.class_names),
        )
    size = row.size(image_size)
    return Extent(
        samples=left(size.samples, holdout, train_images),
        classes=size.classes,
        shape=size.shape,
        augment=parse(augment, auto=row.augment, on=augment_on),
        said=f"{place}, not opened, taken for {row.stands_for}" if row.stands_for else place,
        class_names=size.class_names,
    )


def _image_bytes(train: Source) -> float | None:
    index = getattr(train.source if isinstance(train, Subset) else train, "index", None)
    return None if index is None else sum(index.sizes) / len(index.rows)
