"""How large a data set is, opened or not: what a dry run needs to know of it."""

from dataclasses import dataclass
from pathlib import Path

from . import Data, load
from .augment import Augment, parse
from .sets import data_set
from .subset import left


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Size of a data set. `shape` is (channels, height, width); `said` says where this is from."""

    samples: int  # in training
    classes: int
    shape: tuple[int, int, int]
    augment: Augment
    said: str


def extent(
    name: str,
    data_dir: str | Path | None,
    *,
    image_size: int,
    augment: str,
    seed: int = 0,
    holdout: int = 0,
    train_images: int | None = None,
    opened: bool = True,
) -> Extent:
    """By the words of --data, --data_dir and --augment.

    What comes with the program is not opened. Nor is a folder that is not here where another data
    set can stand for it, such as ImageNet-1k for images; with `opened` False nothing is.
    ConfigError as of `load`, for what is here or needs no folder.
    """
    row = data_set(name)
    absent = bool(row.stands_for) and not Path(data_dir or "").exists()
    if opened and data_dir and not absent:
        data = load(
            name,
            data_dir,
            image_size=image_size,
            augment=augment,
            seed=seed,
            holdout=holdout,
            train_images=train_images,
        )
        return _of(data, data_dir)
    size = row.size(image_size)
    place = f"{name} {data_dir}" if data_dir else name
    return Extent(
        samples=left(size.samples, holdout, train_images),
        classes=size.classes,
        shape=size.shape,
        augment=parse(augment, auto=row.augment),
        said=f"{place}, not opened, taken for {row.stands_for}" if row.stands_for else place,
    )


def _of(data: Data, data_dir: str | Path | None) -> Extent:
    return Extent(
        samples=len(data.train),
        classes=data.num_classes,
        shape=data.shape,
        augment=data.train.augment,
        said=f"{data.name} {data_dir}" if data_dir else data.name,
    )
