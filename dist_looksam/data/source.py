"""What every data set offers to the loader."""

from typing import Protocol

from torch import Tensor

from .augment import Augment


class Source(Protocol):
    """A data set with random access, one split of it."""

    class_names: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]  # per channel, of images scaled to 0..1
    std: tuple[float, ...]
    labels: Tensor  # int64 [len]
    augment: Augment
    parallel: bool  # whether fetch gains from threads

    def __len__(self) -> int: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def corrupt(self) -> int:
        """Unreadable files met so far. Each was named, and another sample took its place."""
        ...

    def fetch(self, indices: Tensor, keys: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        """Images uint8 [n, C, H, W] and labels int64 [n] of the samples `indices`, int64 [n].

        keys, int64 [n], are the samples' global numbers; with train=True the augmentation of a
        sample depends on the seed and its key alone. Safe to call from several threads.
        """
        ...
