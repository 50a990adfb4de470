"""The loss of a trained model over fixed samples, its gradient, and products with its Hessian.

Every rank holds the whole model and its part of the samples. Sums are reduced over the ranks, so
that results do not depend on their number, up to rounding. The model is in eval mode: no dropout,
no drop-path, running statistics of BatchNorm. The loss is the mean cross-entropy, without label
smoothing, of images without augmentation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import models
from ..data import Batch, EvalLoader, Order, Source
from ..data.source import UNREADABLE
from ..data.subset import Subset


@dataclass(frozen=True)
class Score:
    """Mean loss and share of right answers over some samples."""

    loss: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """This rank's samples of one split, uint8 on the device, in `num_groups` consecutive groups."""

    images: Tensor
    labels: Tensor
    ends: Sequence[int]  # group i is samples [ends[i], ends[i + 1])
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_groups(self) -> int:
        return len(self.ends) - 1

    def batches(self, micro_batch: int, group: int | None = None) -> Iterator[Batch]:
        """Of one group, or of all; normalised."""
        first, last = (0, len(self.labels)) if group is None else self.ends[group : group + 2]
        for low in range(first, last, micro_batch):
            at = slice(low, min(low + micro_batch, last))
            labels = self.labels[at]
            batch = Batch(
                images=self.images[at], labels=labels, keys=labels, mean=self.mean, std=self.std
            )
            yield batch.to(labels.device)


def part(
    source: Source, *, samples: int, groups: int, rank: int, ranks: int, device: torch.device
) -> Part:
    """Loads a rank's groups out of `samples` of the source, drawn the same for every run.

    Group c of `groups` is samples [c n / groups, (c + 1) n / groups) of the drawn order.
    """
    drawn = Order(len(source), seed=0).permutation(0)[:samples]
    mine = range(rank * groups // ranks, (rank + 1) * groups // ranks + 1)
    ends = [c * samples // groups for c in mine]
    own = Subset(source, drawn[ends[0] : ends[-1]])
    loader = EvalLoader(own, micro_batch=256, rank=0, ranks=1, pin=False)
    try:
        images, labels = [torch.empty(0, *own.shape, dtype=torch.uint8)], [own.labels[:0]]
        for batch in loader:
            images.append(batch.images)
            labels.append(batch.labels)
    finally:
        loader.close()
    return Part(
        images=torch.cat(images).to(device),
        labels=torch.cat(labels).to(device),
        ends=[end - ends[0] for end in ends],
        mean=own.mean,
        std=own.std,
    )


class Objective:
    """The loss over `train`, and scores over `train` and `test`.

    Args:
        model: on the device of the samples; its weights are changed and restored, bit for bit.
        total: [n] -> its sum over the ranks.
        micro_batch: samples per forward.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Part,
        test: Part,
        *,
        total: Callable[[Tensor], Tensor],
        micro_batch: int,
    ) -> None:
        self.model = model.eval()
        self.train, self.test = train, test
        self.total, self.micro_batch = total, micro_batch
        self.weights = [p.requires_grad_() for p in model.parameters()]
        self.saved = [p.detach().clone() for p in self.weights]
        readable = (train.labels != UNREADABLE).sum().double()
        self.count = float(total(readable.view(1)))

    def scores(self, groups: Sequence[int] | None = None) -> Tensor:
        """[2, 3] float64, this rank's sums over both splits: loss, right answers, samples."""
        return torch.stack([self._sums(self.train, groups), self._sums(self.test, groups)])

    @torch.no_grad()
    def _sums(self, samples: Part, groups: Sequence[int] | None) -> Tensor:
        sums = torch.zeros(3, dtype=torch.float64, device=samples.labels.device)
        for group in [None] if groups is None else groups:
            for batch in samples.batches(self.micro_batch, group):
                loss, logits = self._loss(batch)
                right = (logits.argmax(-1) == batch.labels).sum()
                readable = (batch.labels != UNREADABLE).sum()
                sums += torch.stack([loss.double(), right.double(), readable.double()])
        return sums

    def reduced(self, sums: Tensor) -> dict[str, Score]:
        """{"train", "test"} of the sums of all ranks. Collective."""
        train, test = (row.tolist() for row in self.total(sums))
        return {
            "train": Score(train[0] / train[2], train[1] / train[2]),
            "test": Score(test[0] / max(test[2], 1.0), test[1] / max(test[2], 1.0)),
        }

    def score(self) -> dict[str, Score]:
        """Over all samples. Collective."""
        return self.reduced(self.scores())

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum over a micro-batch, and the logits. Other kernels of attention than the plain one
        have no second derivative, and their sums would not be of the same function."""
        with sdpa_kernel(SDPBackend.MATH):
            logits = models.call(self.model, batch.images, None)
            return nn.functional.cross_entropy(logits, batch.labels, reduction="sum"), logits

    def gradient(self, group: int | None = None) -> list[Tensor]:
        """Of the mean loss over one group of this rank, or over all samples (then collective)."""
        count = self.count
        if group is not None:
            labels = self.train.labels[self.train.ends[group] : self.train.ends[group + 1]]
            count = max(1.0, float((labels != UNREADABLE).sum()))
        grads = [torch.zeros_like(p) for p in self.weights]
        for batch in self.train.batches(self.micro_batch, group):
            loss = self._loss(batch)[0] / count
            self._add(grads, torch.autograd.grad(loss, self.weights, materialize_grads=True))
        return grads if group is not None else self.split(self.total(flat(grads)))

    def hessian_times(self, vector: Tensor) -> Tensor:
        """[P] -> [P]: the Hessian of the mean loss over all samples, times a vector. Collective.

        By double backward (Pearlmutter 1994): the gradient of gradient . vector.
        """
        pieces = self.split(vector)
        products = [torch.zeros_like(p) for p in self.weights]
        for batch in self.train.batches(self.micro_batch):
            loss = self._loss(batch)[0] / self.count
            grads = torch.autograd.grad(
                loss, self.weights, create_graph=True, materialize_grads=True
            )
            along = torch.stack([(g * v).sum() for g, v in zip(grads, pieces, strict=True)]).sum()
            self._add(products, torch.autograd.grad(along, self.weights, materialize_grads=True))
        return self.total(flat(products))

    @staticmethod
    def _add(sums: list[Tensor], more: Sequence[Tensor]) -> None:
        torch._foreach_add_(sums, list(more))

    def split(self, vector: Tensor) -> list[Tensor]:
        """[P] as tensors of the weights' shapes."""
        pieces = vector.split([p.numel() for p in self.weights])
        return [v.view(p.shape) for v, p in zip(pieces, self.weights, strict=True)]

    @contextmanager
    def moved(self, steps: Sequence[Tensor]) -> Iterator[None]:
        """Weights are w + steps inside."""
        with self.at([w + step for w, step in zip(self.saved, steps, strict=True)]):
            yield

    @contextmanager
    def at(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Weights are these inside."""
        try:
            self._put(weights)
            yield
        finally:
            self._put(self.saved)

    @torch.no_grad()
    def _put(self, weights: Sequence[Tensor]) -> None:
        for p, w in zip(self.weights, weights, strict=True):
            p.copy_(w)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all entries."""
    return torch.cat([t.reshape(-1) for t in tensors])
