"""Accuracy and loss of an engine's weights on the evaluation images."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import models
from ..backends.backend import Backend
from ..data import Batch
from ..data.source import UNREADABLE
from ..maths.scores import sums


@dataclass(frozen=True)
class Found:
    """Accuracies as fractions, and the steps done before that evaluation; None: not known.

    Checkpoints keep them under these names; older ones have no top5 and no ema_top1.
    """

    top1: float | None = None
    top5: float | None = None
    ema_top1: float | None = None  # of the averaged weights
    evaluated: int | None = None

    def accuracy(self) -> dict[str, float | None]:
        """For summary.json."""
        ema = {} if self.ema_top1 is None else {"ema_top1": self.ema_top1}
        return {"top1": self.top1, "top5": self.top5, **ema}

    def __str__(self) -> str:
        return ", ".join(
            f"{name.replace('ema_top1', 'ema')} {value:.4f}"
            for name, value in self.accuracy().items()
            if name != "top5" and value is not None
        )


@torch.no_grad()
def scores(
    backend: Backend, batches: Iterable[Batch], device: torch.device
) -> tuple[float, float, float] | None:
    """top1 and top5 (fractions) and mean loss over the images of all ranks; None: of no image.

    Collective. Images that cannot be read count nowhere.
    """
    backend.module.eval()
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        total += _of_batch(backend, batch.to(device))
    right, among, loss, count = (backend.mean(total) * backend.size).tolist()
    backend.module.train()
    return (right / count, among / count, loss / count) if count else None


def _of_batch(backend: Backend, batch: Batch) -> Tensor:
    logits = backend.evaluate(lambda m: models.call(m, batch.images, None))
    return sums(logits, batch.labels, ignore=UNREADABLE)
