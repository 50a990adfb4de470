"""Fewer training images: --train_images N of them, and --holdout of those kept aside.

Settings are chosen on what is kept aside, so that they are not on the test set.
"""

import hashlib

from torch import Tensor

from ..errors import ConfigError
from .augment import Augment
from .order import Order
from .source import Source


class Subset:
    """The samples `indices`, int64 [n], of a source; itself a source.Source."""

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source = source
        self.indices = indices
        self.class_names = source.class_names
        self.shape = source.shape
        self.mean, self.std = source.mean, source.std
        self.labels = source.labels[indices]
        self.augment: Augment = source.augment
        self.parallel = source.parallel
        self.passed_over, self.unreadable = source.passed_over, source.unreadable  # of the whole

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    def digest(self) -> str:
        """See source.Source.digest."""
        text = f"{self.source.digest()} {self.indices.tolist()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def fetch(self, indices: Tensor, keys: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        """See source.Source.fetch."""
        return self.source.fetch(self.indices[indices], keys, train)


def left(samples: int, holdout: int, train_images: int | None = None) -> int:
    """How many of the samples are trained on. ConfigError where that would be none, or too many."""
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


def split(train: Source, holdout: int, train_images: int | None = None) -> tuple[Subset, Subset]:
    """(what is trained on, `holdout` samples): random, the same for every seed and number of ranks.

    Together they are `train_images` samples, by default all. More of them contain the fewer.
    ConfigError as of `left`.
    """
    first = left(len(train), holdout, train_images)
    shuffled = Order(len(train), seed=0).permutation(0)
    return Subset(train, shuffled[:first]), Subset(train, shuffled[first : first + holdout])
