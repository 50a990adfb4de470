"""Your own images in tar shards: DIR/train-*.tar and DIR/val-*.tar."""

from pathlib import Path
from typing import Any

from ..source import Source
from . import DataSet, imagenet


def open_(data_dir: Any, **how: Any) -> tuple[Source, Source]:
    """Reads both indices; see `tar.tar`."""
    from ..tar import tar  # imports the decoders, which other data sets do not need

    return tar(data_dir, **how)


def holds(place: str) -> bool:
    """A folder with *.tar, or a pattern of other names than *.parquet."""
    return ("{" in place and not place.endswith(".parquet")) or any(Path(place).glob("*.tar"))


def index_(place: str, **how: Any) -> dict[str, tuple[int, int]]:
    """See `shards.write_index`."""
    from ..shards import write_index

    return write_index(place, **how)


def stage_(data_dir: Any, cache: Any, told: Any) -> Any:
    """Copies the shards; see `stage.stage`."""
    from ..shards import shards_of
    from ..stage import stage

    return stage(data_dir, shards_of(data_dir), cache, told)


ROW = DataSet(
    name="tar",
    open=open_,
    size=imagenet,
    holds=holds,
    index=index_,
    stage=stage_,
    stands_for="ImageNet-1k",
    data_dir="needs",
    epochs=90.0,
    augment="crop,flip",
    place=4,
)
