"""A data set that is held in memory as one tensor."""

import hashlib

import torch
from torch import Tensor

from .augment import Augment, flips, shift_crop
from .policies import change_batch


class Embedded:
    """A split that is held in memory as one tensor. Attributes and methods: see source.Source."""

    parallel = False
    decoder = ""
    crop = 1.0
    fill: tuple[int, ...] = (0,)

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

    def digest(self) -> str:
        content = self.images.numpy().tobytes() + self.labels.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()

    def fetch(self, indices: Tensor, keys: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        images, labels = self.images[indices], self.labels[indices]
        if train and (self.augment.crop or self.augment.simple):
            images = shift_crop(images, self.seed, keys, simple=self.augment.simple)
        if train and self.augment.flip:
            images = torch.where(
                flips(self.seed, keys)[:, None, None, None], images.flip(-1), images
            )
        if train:
            images = change_batch(images, self.augment.of_host, self.seed, keys)
        return images, labels
