"""Subsets of the training images: --train_images of them, --holdout of these held out.

Settings are chosen on held-out images instead of the test set.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .augment import Augment
from .order import Order
from .source import Source


class Subset:
    """The samples `indices`, int64 [n], of a source; itself a source.Source."""

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source: Any = source
        self.indices = indices
        self.class_names = source.class_names
        self.shape = source.shape
        self.mean, self.std = source.mean, source.std
        self.labels = source.labels[indices]
        self.augment: Augment = source.augment
        self.parallel, self.decoder = source.parallel, source.decoder
        self.crop, self.fill = source.crop, source.fill
        self.passed_over, self.unreadable = source.passed_over, source.unreadable  # of all samples

    def __len__(self) -> int:
        return len(self.indices)

    def digest(self) -> str:
        text = f"{self.source.digest()} {self.indices.tolist()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def fetch(
        self, indices: Tensor, keys: Tensor, train: bool, **how: Any
    ) -> tuple[Tensor, Tensor]:
        return self.source.fetch(self.indices[indices], keys, train, **how)

    def changes(self, keys: Tensor, train: bool) -> Sequence[Any]:
        return self.source.changes(keys, train)


def left(samples: int, holdout: int, train_images: int | None = None) -> int:
    """The number of samples to train on. ConfigError if there are none, or too few samples."""
    if train_images is not None and not 1 <= train_images <= samples:
        raise ConfigError(
            f"train_images must be from 1 to the {samples} there are, got {train_images}."
        )
    samples = train_images or samples
    if not 0 <= holdout < samples:
        raise ConfigError(
            f"holdout must be from 0 to {samples - 1}, one less than the {samples} training "
            f"images, got {holdout}."
        )
    return samples - holdout


def split(
    train: Source, holdout: int, train_images: int | None = None, *, in_order: bool = False
) -> tuple[Subset, Subset]:
    """(training samples, `holdout` samples): random, the same for every seed and number of ranks.

    Together they are `train_images` samples, by default all; a larger number contains the samples
    of a smaller one. With `in_order` the training samples are in the order of `train`,
    else in that of the choice. ConfigError as of `left`.
    """
    first = left(len(train), holdout, train_images)
    shuffled = Order(len(train), seed=0).permutation(0)
    kept = shuffled[:first].sort().values if in_order else shuffled[:first]
    return Subset(train, kept), Subset(train, shuffled[first : first + holdout])
