"""Your own images: DIR/train/CLASS/* and DIR/val/CLASS/*."""

from typing import Any

from ..source import Source
from . import DataSet, Size


def open_(data_dir: Any, **how: Any) -> tuple[Source, Source]:
    """Scans both trees; see `folder.folder`."""
    from ..folder import folder  # imports the decoders, which other data sets do not need

    return folder(data_dir, **how)


ROW = DataSet(
    name="folder",
    open=open_,
    # ILSVRC-2012
    size=lambda side: Size(samples=1_281_167, classes=1000, shape=(3, side, side)),
    stands_for="ImageNet-1k",
    data_dir="needs",
    epochs=90.0,
    augment="crop,flip",
    place=3,
)
