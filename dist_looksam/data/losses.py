"""The training losses of a micro-batch. Each is a mean with the same divisor in every micro-batch,
so that the mean over micro-batches and ranks is that of the global batch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .batch import Batch

LOSSES = {"ce": "cross-entropy", "bce": "binary cross-entropy"}  # value of --loss: its name


def targets(batch: Batch, num_classes: int, label_smoothing: float = 0.0) -> Tensor:
    """The probability of each class, float32 [n, num_classes], rows of sum 1.

    A mixed sample has lam of its own label and 1 - lam of its partner's; of both, label_smoothing
    is spread evenly over all classes.
    """
    own = batch.labels[:, None]
    shares = torch.zeros(len(batch), num_classes, device=own.device)
    if batch.partner is None or batch.lam is None:
        shares.scatter_(1, own, 1.0)
    else:
        lam = batch.lam[:, None]
        shares.scatter_(1, own, lam).scatter_add_(1, batch.partner[:, None], 1 - lam)
    return shares * (1 - label_smoothing) + label_smoothing / num_classes


def cross_entropy(
    logits: Tensor, batch: Batch, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Mean loss over the micro-batch, float32 scalar; logits [n, classes] of any float type.

    A mixed sample's loss is lam * loss(own label) + (1 - lam) * loss(partner's label). With
    `weights`, float32 [classes], each class's share of a sample's target counts so many times. The
    sum is divided by n, not by the sum of weights, which differs between micro-batches.
    """
    logits = logits.float()

    def of(labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, labels, weights, label_smoothing=label_smoothing, reduction="none"
        )

    own = of(batch.labels)
    if batch.partner is None or batch.lam is None:
        return own.mean()
    return (batch.lam * own + (1 - batch.lam) * of(batch.partner)).mean()


def binary_cross_entropy(
    logits: Tensor,
    batch: Batch,
    label_smoothing: float = 0.0,
    threshold: float | None = None,
) -> Tensor:
    """Mean over micro-batch and classes of the cross-entropy of each class's own yes or no, float32
    scalar; logits [n, classes] of any float type, `targets` the probabilities of yes.

    The mean over classes is that of timm's BinaryCrossEntropy and of DeiT III, arXiv:2204.07118.

    Args:
        threshold: a class of a larger target has target 1, every other 0. Of both classes of a
            mixed sample it is 1 where it is 0, as in DeiT III's code. None: targets as they are.
    """
    wanted = targets(batch, logits.shape[-1], label_smoothing)
    if threshold is not None:
        wanted = (wanted > threshold).float()
    return F.binary_cross_entropy_with_logits(logits.float(), wanted)
