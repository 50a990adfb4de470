"""Data sets without a download: Fashion-MNIST from a Debian package, digits of scikit-learn."""

import gzip
import hashlib
import zlib
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .augment import Augment, flips, shift_crop
from .order import Order
from .randaugment import randaugment_batch

FASHION_DIR = "/usr/share/datasets/fashion-mnist"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_DIGITS_TEST = 360


class Embedded:
    """A split held in memory as one tensor; see source.Source."""

    parallel = False

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        class_names: tuple[str, ...],
        mean: float,
        std: float,
        augment: Augment,
        seed: int,
    ) -> None:
        """images uint8 [N, 1, H, W], labels int64 [N]; mean and std of images scaled to 0..1."""
        self.images = images
        self.labels = labels
        self.class_names = class_names
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.mean: tuple[float, ...] = (mean,)
        self.std: tuple[float, ...] = (std,)
        self.augment = augment
        self.seed = seed
        self.passed_over: dict[str, tuple[int, str]] = {}
        self.unreadable: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def digest(self) -> str:
        """See source.Source.digest."""
        both = self.images.numpy().tobytes() + self.labels.numpy().tobytes()
        return hashlib.sha256(both).hexdigest()

    def fetch(self, indices: Tensor, keys: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        """See source.Source.fetch."""
        images, labels = self.images[indices], self.labels[indices]
        if train and self.augment.crop:
            images = shift_crop(images, self.seed, keys)
        if train and self.augment.flip:
            images = torch.where(
                flips(self.seed, keys)[:, None, None, None], images.flip(-1), images
            )
        if train and self.augment.ops:
            images = randaugment_batch(
                images, self.seed, keys, magnitude=self.augment.magnitude, ops=self.augment.ops
            )
        return images, labels


def fashion_mnist(
    data_dir: str | Path | None, *, augment: Augment, seed: int
) -> tuple[Embedded, Embedded]:
    """60,000 + 10,000 images 28x28 of clothes. ConfigError if the files are missing."""
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


def digits(*, augment: Augment, seed: int) -> tuple[Embedded, Embedded]:
    """1,437 + 360 handwritten digits 8x8; the split is the same for every seed."""
    # As sklearn.datasets.load_digits reads it, whose import takes every rank 1.5 s.
    table = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(str(table), delimiter=","))  # 64 pixels 0..16, the digit
    pixels = (rows[:, :-1] / 16 * 255).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    labels = rows[:, -1].long()
    shuffled = Order(len(labels), seed=0).permutation(0)
    splits = [
        Embedded(
            pixels[part],
            labels[part],
            class_names=tuple(str(digit) for digit in range(10)),
            mean=0.3053,
            std=0.3757,
            augment=augment,
            seed=seed,
        )
        for part in (shuffled[_DIGITS_TEST:], shuffled[:_DIGITS_TEST])
    ]
    return splits[0], splits[1]
