"""Fashion-MNIST from a Debian package: 60,000 + 10,000 grey images 28x28 of clothes."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ..augment import Augment
from ..embedded import Embedded
from . import DataSet, Size

FASHION_DIR = "/usr/share/datasets/fashion-mnist"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def open_(
    data_dir: str | Path | None, *, image_size: int, augment: Augment, seed: int
) -> tuple[Embedded, Embedded]:
    """Both splits, 28x28 whatever `image_size` is. ConfigError if the files are missing."""
    folder = Path(data_dir or FASHION_DIR)
    splits = []
    for stem in ("train", "t10k"):
        images = _idx(folder / f"{stem}-images-idx3-ubyte.gz", dims=3)
        labels = _idx(folder / f"{stem}-labels-idx1-ubyte.gz", dims=1)
        if not len(images) == len(labels) > 0 or labels.max() >= len(FASHION_CLASSES):
            raise ConfigError(
                f"{folder}/{stem}-* must hold as many images as labels, from 0 to 9, got "
                f"{len(images)} images and {len(labels)} labels; replace them."
            )
        splits.append(
            Embedded(
                images[:, None],
                labels.long(),
                class_names=FASHION_CLASSES,
                mean=0.2860,
                std=0.3530,
                augment=augment,
                seed=seed,
            )
        )
    return splits[0], splits[1]


def _idx(path: Path, *, dims: int) -> Tensor:
    """Reads an IDX file of bytes: magic 0 0 8 dims, big-endian sizes, then the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"--data fashion_mnist needs {path}, which does not exist; install it with "
            "'apt-get install dataset-fashion-mnist', use --data digits, or name the folder of the "
            "four .gz files with --data_dir."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"--data fashion_mnist cannot read {path}: {error}; replace it."
        ) from None
    header = 4 + 4 * dims
    sizes = np.frombuffer(raw[4:header].ljust(4 * dims, b"\0"), dtype=">u4").astype(int)
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != header + sizes.prod():
        raise ConfigError(f"{path} is not a whole IDX file of {dims} dimensions; replace it.")
    pixels = np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(sizes)
    return torch.from_numpy(pixels.copy())


ROW = DataSet(
    name="fashion_mnist",
    open=open_,
    size=lambda image_size: Size(
        samples=60_000, classes=10, shape=(1, 28, 28), class_names=FASHION_CLASSES
    ),
    epochs=5.0,
    place=1,
)
