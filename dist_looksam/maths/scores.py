"""Scores of classification: sums over samples that ranks add up, and numbers made of them."""

import torch
from torch import Tensor
from torch.nn import functional as F

FIRST = 5  # of top5
BINS = 15  # of the calibration error


def sums(logits: Tensor, labels: Tensor, *, ignore: int) -> Tensor:
    """[4] float64: samples with the right answer, those with it among the first 5, the sum of
    their cross-entropies, their number.

    logits [n, classes] of any float type; labels int64 [n]; those equal to `ignore` do not count.
    """
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=ignore)
    first = logits.topk(min(FIRST, logits.shape[-1]), dim=-1).indices
    right = logits.argmax(-1) == labels
    among = right | (first == labels[:, None]).any(-1)
    count = (labels != ignore).sum()
    return torch.stack([right.sum(), among.sum(), loss, count]).double()


def bins(logits: Tensor, labels: Tensor, *, ignore: int) -> Tensor:
    """[3, BINS] float64: samples, right answers and confidence, by confidence.

    Confidence is the largest probability; bin b holds those in (b / BINS, (b + 1) / BINS].
    """
    counted = labels != ignore
    sure, answer = logits[counted].double().softmax(-1).max(-1)
    right = (answer == labels[counted]).double()
    at = (sure.nan_to_num(1.0) * BINS).ceil().long().clamp(1, BINS) - 1
    rows = torch.stack([torch.ones_like(sure), right, sure])
    return torch.zeros(3, BINS, dtype=torch.float64, device=logits.device).index_add(1, at, rows)


def calibration_error(sums: Tensor) -> float:
    """Expected calibration error of the sums of `bins`: the mean over all samples of
    |accuracy - confidence| of their bin (Guo et al. 2017, arXiv:1706.04599, eq. 5)."""
    samples, right, sure = sums
    return float((right - sure).abs().sum() / samples.sum())
