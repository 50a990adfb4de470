"""Interface between data sets and the loader."""

from typing import Protocol

from torch import Tensor

from .augment import Augment

UNREADABLE = -100  # the label of a sample that cannot be read; torch's cross_entropy ignores it


class Source(Protocol):
    """A data set with random access, one split of it."""

    class_names: tuple[str, ...]
    shape: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]  # per channel, of images scaled to 0..1
    std: tuple[float, ...]
    labels: Tensor  # int64 [len]
    augment: Augment
    crop: float  # share of the shorter side that evaluation cuts from the middle of a picture
    fill: tuple[int, ...]  # per channel, 0..255: what comes in where augmentation moves an image
    parallel: bool  # whether fetch gains from threads
    decoder: str  # the library whose pixels JPEG files have; "" without files
    passed_over: dict[str, tuple[int, str]]  # reason: (number of unused files and folders, one)
    unreadable: dict[str, str]  # name of a sample that could not be read so far: reason

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """A hash of the samples and their order."""

    def fetch(self, indices: Tensor, keys: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        """Images uint8 [n, C, H, W] and labels int64 [n] of the samples `indices`, int64 [n].

        keys, int64 [n], are the samples' global numbers; with train=True the augmentation of a
        sample depends on the seed and its key alone. Safe to call from several threads. A sample
        that cannot be read has the label UNREADABLE and an undefined image; `unreadable` names it.
        If `parallel`, there is changes(keys, train), and fetch takes `changes` and `out`: see
        pictures.Pictures.
        """
