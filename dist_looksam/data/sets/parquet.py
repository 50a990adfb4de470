"""Images in Parquet files of Hugging Face's layout: DIR/train-*.parquet, DIR/validation-*."""

from pathlib import Path
from typing import Any

from ..source import Source
from . import DataSet, imagenet


def open_(data_dir: Any, **how: Any) -> tuple[Source, Source]:
    """Reads both indices; see `parquet.parquet`."""
    from ..parquet import parquet  # imports the decoders, which other data sets do not need

    return parquet(data_dir, **how)


def holds(place: str) -> bool:
    """A pattern *.parquet, or a folder with such files, there or in its folder data."""
    inside = ("*.parquet", "data/*.parquet")
    return place.endswith(".parquet") or any(any(Path(place).glob(kind)) for kind in inside)


def index_(place: str, **how: Any) -> dict[str, tuple[int, int]]:
    """See `parquet.write_index`."""
    from ..parquet import write_index

    return write_index(place, **how)


def stage_(data_dir: Any, cache: Any, told: Any) -> Any:
    """Copies the files; see `stage.stage`."""
    from ..parquet import files_of
    from ..stage import stage

    return stage(data_dir, files_of(data_dir)[0], cache, told)


def notes_(train: Any, blocks: Any) -> tuple[str, ...]:
    """See `parquet.advice`."""
    from ..parquet import advice

    return advice(train, blocks)


ROW = DataSet(
    name="parquet",
    open=open_,
    size=imagenet,
    holds=holds,
    index=index_,
    by_group=True,
    stage=stage_,
    notes=notes_,
    stands_for="ImageNet-1k",
    data_dir="needs",
    epochs=90.0,
    augment="crop,flip",
    place=5,
)
