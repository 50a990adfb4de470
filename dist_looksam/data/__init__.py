"""Data: sources of images, their order and augmentation, and the loaders of training and test."""

from dataclasses import dataclass
from pathlib import Path

from .augment import Augment, parse
from .batch import Batch, cross_entropy
from .loader import EvalLoader, TrainLoader
from .order import Order
from .sets import data_set
from .source import Source
from .subset import split

__all__ = [
    "Augment", "Batch", "Data", "EvalLoader", "Order", "Source", "TrainLoader",
    "cross_entropy", "load",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Data:
    """A training and a test split of one data set."""

    name: str
    train: Source
    test: Source

    @property
    def num_classes(self) -> int:
        return self.train.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.train.shape


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    image_size: int = 224,
    augment: str = "auto",
    seed: int = 0,
    holdout: int = 0,
    train_images: int | None = None,
) -> Data:
    """Opens a data set by the words of --data, --data_dir and --augment.

    image_size  pixels, of folder; the embedded sets keep their own size
    seed        of the augmentation
    holdout     so many training images are left out and become the test split; 0: the real one
    train_images  so many are used, `holdout` of them to test on; None: all
    ConfigError for an unknown name, a malformed augment, or data that is missing or malformed.
    """
    row = data_set(name)
    row.check_dir(data_dir)
    wanted = parse(augment, auto=row.augment)
    train, test = row.open(data_dir, image_size=image_size, augment=wanted, seed=seed)
    if holdout or train_images is not None:
        train, held = split(train, holdout, train_images)
        test = held if holdout else test
    return Data(name=name, train=train, test=test)
