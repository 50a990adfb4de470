"""Learning rate over steps, and over batch sizes."""

import math

SCHEDULES = ("cosine", "linear", "constant")
SCALINGS = ("none", "sqrt", "linear")


def factor(step: int, *, steps: int, warmup: int, schedule: str) -> float:
    """The factor in (0, 1] of the peak learning rate at `step`, counted from 0.

    Warm-up is linear: step 0 gets 1 / warmup, step warmup - 1 gets 1. After it, `cosine` and
    `linear` decay towards 0, which they would reach at step `steps`: no step has a rate of 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done))


def scaled_lr(lr: float, *, batch_size: int, base_batch: int, scaling: str) -> float:
    """The learning rate tuned at `base_batch`, scaled to `batch_size`.

    sqrt keeps the noise of Adam-like updates (You et al., arXiv:1904.00962), linear that of SGD
    (Goyal et al., arXiv:1706.02677).
    """
    times = batch_size / base_batch
    return lr * {"none": 1.0, "sqrt": math.sqrt(times), "linear": times}[scaling]
