"""Accuracy and loss of an engine's weights on the evaluation images."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import models
from ..backends.backend import Backend
from ..data import Batch
from ..data.source import UNREADABLE


@torch.no_grad()
def scores(
    backend: Backend, batches: Iterable[Batch], device: torch.device
) -> tuple[float, float] | None:
    """Top-1 accuracy (a fraction) and mean loss over the images of all ranks; None: of no image.

    Collective. Images that cannot be read count nowhere.
    """
    backend.module.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        sums += _score(backend, batch.to(device))
    right, loss, count = (backend.mean(sums) * backend.size).tolist()
    backend.module.train()
    return (right / count, loss / count) if count else None


def _score(backend: Backend, batch: Batch) -> Tensor:
    logits = backend.evaluate(lambda m: models.call(m, batch.images, None)).float()
    loss = cross_entropy(logits, batch.labels, reduction="sum")  # leaves UNREADABLE out
    right = (logits.argmax(-1) == batch.labels).sum()
    count = (batch.labels != UNREADABLE).sum()
    return torch.stack([right.double(), loss.double(), count.double()])
