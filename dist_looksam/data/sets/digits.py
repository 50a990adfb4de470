"""scikit-learn's handwritten digits: 1,437 + 360 grey images 8x8."""

from importlib.metadata import distribution

import numpy as np
import torch
from torch.nn import functional

from ..augment import Augment
from ..embedded import Embedded
from ..order import Order
from . import DataSet, Size

_TEST = 360
CLASSES = tuple("0123456789")


def open_(
    data_dir: object, *, image_size: int, augment: Augment, seed: int
) -> tuple[Embedded, Embedded]:
    """Both splits, the same for every seed, 8x8 whatever `image_size` is."""
    return splits(augment=augment, seed=seed)


def splits(
    *, side: int = 8, std: float = 0.3757, augment: Augment, seed: int
) -> tuple[Embedded, Embedded]:
    """Training and test images, enlarged to side x side (bilinear); std is that of
    their pixels."""
    # As sklearn.datasets.load_digits, whose import would take every rank 1.5 s.
    table = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(str(table), delimiter=","))  # 64 pixels 0..16, the digit
    pixels = (rows[:, :-1] / 16 * 255).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    if side != 8:
        larger = functional.interpolate(pixels.float(), size=(side, side), mode="bilinear")
        pixels = larger.round().to(torch.uint8)
    labels = rows[:, -1].long()
    shuffled = Order(len(labels), seed=0).permutation(0)
    parts = [
        Embedded(
            pixels[part],
            labels[part],
            class_names=CLASSES,
            mean=0.3053,
            std=std,
            augment=augment,
            seed=seed,
        )
        for part in (shuffled[_TEST:], shuffled[:_TEST])
    ]
    return parts[0], parts[1]


ROW = DataSet(
    name="digits",
    open=open_,
    size=lambda image_size: Size(samples=1437, classes=10, shape=(1, 8, 8), class_names=CLASSES),
    data_dir="never",
    epochs=30.0,
    place=2,
)
