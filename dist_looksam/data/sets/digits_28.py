"""The handwritten digits of `digits`, enlarged to Fashion-MNIST's 28x28: to fine-tune from weights
of the one on the other."""

from ..augment import Augment
from ..embedded import Embedded
from . import DataSet, Size, digits


def open_(
    data_dir: object, *, image_size: int, augment: Augment, seed: int
) -> tuple[Embedded, Embedded]:
    """Both splits, the same for every seed, 28x28 whatever `image_size` is."""
    return digits.splits(side=28, std=0.3244, augment=augment, seed=seed)


ROW = DataSet(
    name="digits_28",
    open=open_,
    size=lambda image_size: Size(
        samples=1437, classes=10, shape=(1, 28, 28), class_names=digits.CLASSES
    ),
    data_dir="never",
    epochs=30.0,
)
