"""Learning rate over steps and over batch sizes; rho over steps."""

import math

SCHEDULES = ("cosine", "linear", "constant")
RHO_SCHEDULES = ("constant", "lr", "linear", "cosine")
SCALINGS = ("none", "sqrt", "linear")


def factor(step: int, *, steps: int, warmup: int, schedule: str) -> float:
    """The factor in (0, 1] of the peak learning rate at `step`, counted from 0.

    Warm-up is linear: step 0 gets 1 / warmup, step warmup - 1 gets 1. After it, `cosine` and
    `linear` decay towards 0, which they would reach at step `steps`: no step has a rate of 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    return _decayed(min(1.0, (step - warmup) / max(1, steps - warmup)), schedule)


def _decayed(done: float, schedule: str) -> float:
    """The factor from 1 at done = 0 to 0 at done = 1."""
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done))


def extended_factor(step: int, *, first: int, start: float, steps: int, schedule: str) -> float:
    """The factor at `step` >= `first` of a run that was made longer at `first`, where it is
    `start`: from there it decays towards 0, which it would reach at step `steps`, in the shape of
    the schedule."""
    return start * _decayed((step - first) / (steps - first), schedule)


def rho_factor(
    step: int, *, first: int, steps: int, warmup: int, schedule: str, end: float, lr: float
) -> float:
    """The factor of rho at `step`, counted from 0.

    `linear` and `cosine` go from 1 at step `first` to `end`, which they would reach at step
    `steps`. `lr` is end + (1 - end) lr: in proportion to the learning rate, as in GSAM
    (arXiv:2203.08065). A linear warm-up over the first steps from `first` on multiplies
    it, with 1 / warmup at `first`.

    Args:
        end: factor at the end of the run; above 1, rho grows. lr: learning rate / its peak.
    """
    done = min(1.0, max(0, step - first) / max(1, steps - first))
    share = {
        "constant": 1.0,
        "lr": lr,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[schedule]
    ramp = min(1.0, max(0, step - first + 1) / warmup) if warmup else 1.0
    return ramp * (end + (1.0 - end) * share)


def scaled_lr(lr: float, *, batch_size: int, base_batch: int, scaling: str) -> float:
    """The learning rate tuned at `base_batch`, scaled to `batch_size`.

    sqrt keeps the noise of Adam-like updates (You et al., arXiv:1904.00962), linear that of SGD
    (Goyal et al., arXiv:1706.02677).
    """
    times = batch_size / base_batch
    return lr * {"none": 1.0, "sqrt": math.sqrt(times), "linear": times}[scaling]
