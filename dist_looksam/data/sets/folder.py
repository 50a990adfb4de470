"""Your own images: DIR/train/CLASS/* and DIR/val/CLASS/*."""

from typing import Any

from ..source import Source
from . import DataSet, imagenet


def open_(data_dir: Any, **how: Any) -> tuple[Source, Source]:
    """Scans both trees; see `folder.folder`."""
    from ..folder import folder  # imports the decoders, which other data sets do not need

    return folder(data_dir, **how)


ROW = DataSet(
    name="folder",
    open=open_,
    size=imagenet,
    stands_for="ImageNet-1k",
    data_dir="needs",
    epochs=90.0,
    augment="crop,flip",
    place=3,
)
