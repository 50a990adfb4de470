"""Data sets by name: every module of this folder is one row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...rows import load_rows
from ..source import Source


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a data set that is not opened. `shape` is (channels, height, width); image_bytes the
    mean size of an encoded image, 0 if the images are in memory; class_names in the order of the
    logits, () where only the opened data know them."""

    samples: int  # in training, held-out ones included
    classes: int
    shape: tuple[int, int, int]
    image_bytes: int = 0
    class_names: tuple[str, ...] = ()


def imagenet(side: int) -> Size:
    """ILSVRC-2012: 1,281,167 JPEGs, about 110 kB each."""
    return Size(samples=1_281_167, classes=1000, shape=(3, side, side), image_bytes=110_000)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set. A module of this folder binds it to the name ROW.

    open        open(data_dir, image_size=, augment=, seed=) -> its training and its test split; see
                source.Source. ConfigError if data is missing or malformed.
    size        size(image_size), without opening it.
    holds       holds(place): whether the commands of `dist-looksam data` read a place by this row.
    index       index(place, checksums=) -> {split: (samples, files)}; None: it needs no index. See
                index.write.
    by_group    samples are read in groups, so that reading them in any order costs far more.
    stage       stage(data_dir, cache, told) copies its files to a disk of the node; see
                stage.stage. None: there are no large files to copy.
    notes       notes(training split, Blocks or None) -> warnings about its order of reading.
    stands_for  the data set whose size is `size`, if the own size is known only after opening.
    data_dir    whether the flag --data_dir is needed: "needs", "may" or "never".
    epochs      default of --epochs.
    augment     value of --augment auto.
    model       value of --model auto; "auto" chooses by the size of the images.
    place       position in lists of names; rows without one come last, by name.
    """

    name: str
    open: Callable[..., tuple[Source, Source]]
    size: Callable[[int], Size]
    holds: Callable[[str], bool] = lambda place: False
    index: Callable[..., dict[str, tuple[int, int]]] | None = None
    by_group: bool = False
    stage: Callable[..., Any] | None = None
    notes: Callable[..., tuple[str, ...]] = lambda *_: ()
    stands_for: str = ""
    data_dir: str = "may"
    epochs: float = 10.0
    augment: str = "none"
    model: str = "auto"
    place: int = 99

    def check_dir(self, data_dir: object) -> None:
        """ConfigError where --data_dir is missing or must not be."""
        if self.data_dir == "never" and data_dir:
            raise ConfigError(
                f"--data {self.name} takes no --data_dir, got '{data_dir}'; leave it out."
            )
        if self.data_dir == "needs" and not data_dir:
            raise ConfigError(
                f"--data {self.name} needs --data_dir, got none; name the folder of its images."
            )


SETS: dict[str, DataSet] = load_rows(__name__, __path__)


def data_set(name: str) -> DataSet:
    """The row of a name. ConfigError lists the names."""
    if name not in SETS:
        raise ConfigError(f"--data is '{name}', which is not known; use one of {', '.join(SETS)}.")
    return SETS[name]
