"""Data: sources of images, their order and augmentation, and the loaders of training and test."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import on_device
from .augment import Augment, parse
from .batch import Batch
from .blocks import FULL, check_mixed, parse_shuffle
from .loader import EvalLoader, TrainLoader
from .order import Order
from .sets import data_set
from .source import Source
from .subset import split

__all__ = [
    "Augment", "Batch", "Data", "EvalLoader", "Order", "Source", "TrainLoader",
    "load",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Data:
    """A training and a test split of one data set.

    notes     warnings on how they were opened.
    uncached  host: a sentence why its ranks do not read from --data_cache.
    """

    name: str
    train: Source
    test: Source
    notes: tuple[str, ...] = ()
    uncached: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def num_classes(self) -> int:
        return len(self.train.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.train.shape

    def decoding(self) -> list[str]:
        """A sentence for the log on how JPEG files are decoded; none for data without files."""
        if not self.train.decoder:
            return []
        from .decode import route  # imports the decoders, which other data sets do not need

        return [route()[1]]

    def augmenting(self, device: torch.device) -> list[str]:
        """A sentence for the log on what of the augmentation the device does; none for nothing."""
        return [on_device.note(device)] if self.train.augment.on_device else []


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    image_size: int = 224,
    augment: str = "auto",
    augment_on: str = "host",
    seed: int = 0,
    holdout: int = 0,
    train_images: int | None = None,
    shuffle: str = FULL,
) -> Data:
    """Opens a data set by the values of --data, --data_dir, --augment and --augment_on.

    image_size    in pixels, of folder; the embedded sets have a fixed size
    seed          of the augmentation
    holdout       number of training images that replace the test split; 0: none
    train_images  number of training images used, `holdout` included; None: all
    shuffle       the order of training, for which the images must be mixed where it is in blocks
    ConfigError for an unknown name, a malformed augment, or data that is missing or malformed.
    """
    row = data_set(name)
    row.check_dir(data_dir)
    settings = parse(augment, auto=row.augment, on=augment_on)
    train, test = row.open(data_dir, image_size=image_size, augment=settings, seed=seed)
    blocks = parse_shuffle(shuffle)
    if blocks is not None:
        check_mixed(train.labels, shuffle)
    notes = row.notes(train, blocks)
    if holdout or train_images is not None:
        train, held_out = split(train, holdout, train_images, in_order=blocks is not None)
        test = held_out if holdout else test
    return Data(name=name, train=train, test=test, notes=notes)
