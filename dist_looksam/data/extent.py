"""How large a data set is, opened or not: what a dry run needs to know of it."""

from dataclasses import dataclass
from pathlib import Path

from . import Data, load
from .augment import Augment, parse
from .subset import left


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Size of a data set. `shape` is (channels, height, width); `said` says where this is from."""

    samples: int  # in training
    classes: int
    shape: tuple[int, int, int]
    augment: Augment
    said: str


# samples, classes, shape of what comes with the program or its packages; a test opens them.
EMBEDDED = {"digits": (1437, 10, (1, 8, 8)), "fashion_mnist": (60_000, 10, (1, 28, 28))}
IMAGENET = (1_281_167, 1000)  # ILSVRC-2012: training images, classes


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

    An image folder that is not here is taken for ImageNet-1k; with `opened` False any is.
    ConfigError as of `load`, for what is here or needs no folder.
    """
    if name in EMBEDDED and not data_dir:
        samples, classes, shape = EMBEDDED[name]
        drawn = parse(augment)
        trained = left(samples, holdout, train_images)
        return Extent(samples=trained, classes=classes, shape=shape, augment=drawn, said=name)
    if name == "folder" and data_dir and not (opened and Path(data_dir).exists()):
        return Extent(
            samples=left(IMAGENET[0], holdout, train_images),
            classes=IMAGENET[1],
            shape=(3, image_size, image_size),
            augment=parse(augment, auto="crop,flip"),
            said=f"folder {data_dir}, not opened, taken for ImageNet-1k",
        )
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


def _of(data: Data, data_dir: str | Path | None) -> Extent:
    return Extent(
        samples=len(data.train),
        classes=data.num_classes,
        shape=data.shape,
        augment=data.train.augment,
        said=f"{data.name} {data_dir}" if data_dir else data.name,
    )
