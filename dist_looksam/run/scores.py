"""Accuracy and loss of an engine's weights on the evaluation images."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import models
from ..backends.backend import Backend
from ..data import Batch
from ..data.source import UNREADABLE
from ..maths.scores import sums


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
