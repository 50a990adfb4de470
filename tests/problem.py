"""One small problem with everything awkward in it, for torch and for the reference alike.

Six layers in two interleaved groups: a two-layer net, biases that start at zero, a decayed layer
that starts at zero, and a layer whose gradient is always zero. Every step has its own samples; on
the QUIET steps (with k = 3 a look and a reuse step) the whole gradient is zero.
"""

import numpy as np
import torch
from torch import Tensor

SHAPES = [(6, 4), (6,), (3, 6), (3,), (3,), (4,)]
W1, B1, W2, B2, SHIFT, IDLE = range(6)
QUIET = (12, 7)
GROUPS = [
    {"layers": [W1, W2, SHIFT, IDLE], "weight_decay": 0.1, "lr": 0.02, "rho": 0.05, "alpha": 0.7},
    {"layers": [B1, B2], "weight_decay": 0.0, "lr": 0.05, "rho": 0.1, "alpha": 0.4},
]


def start() -> list[np.ndarray]:
    numbers = np.random.default_rng(0)
    weights = [0.5 * numbers.standard_normal(s) for s in SHAPES]
    for i in (B1, B2, SHIFT):
        weights[i][:] = 0.0
    return weights


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in start()]


def samples(t: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    numbers = np.random.default_rng(1000 + t)
    x, y = numbers.standard_normal((8, 4)), numbers.standard_normal((8, 3))
    return torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)


def loss(params, t: int) -> Tensor:
    x, y = samples(t, params[0].dtype)
    hidden = torch.tanh(x @ params[W1].T + params[B1])
    out = hidden @ params[W2].T + params[B2] + torch.tanh(params[SHIFT]) * x.mean()
    value = ((out - y) ** 2).mean() + 0.0 * params[IDLE].sum()
    return value * 0.0 if t in QUIET else value


def gradient(weights, t: int):
    """What reference.train asks for."""
    params = [torch.tensor(w, requires_grad=True) for w in weights]
    value = loss(params, t)
    return value.item(), [g.numpy() for g in torch.autograd.grad(value, params)]


class Closure:
    """What a user's training loop hands to step(): zero, compute, backward, return the loss.

    t is the step's number; calls how often it ran in all; bad the (t, pass) in which one number of
    the gradient is spoilt, as an overflow would.
    """

    def __init__(self, params, optimizer, *, bad=(), spoil=float("nan"), loss=loss):
        self.params, self.optimizer, self.bad, self.spoil = params, optimizer, bad, spoil
        self.loss, self.t, self.calls, self._passes = loss, 0, 0, 0

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        value = self.loss(self.params, self.t)
        value.backward()
        self.calls += 1
        self._passes += 1
        if (self.t, self._passes) in self.bad:
            self.params[W2].grad[0, 1] = self.spoil
        return value

    def step(self) -> int:
        """One step on the next samples; how many gradients it took."""
        self._passes = 0
        self.optimizer.step(self)
        self.t += 1
        return self._passes


def train(params, optimizer, steps: int, **how) -> Closure:
    """Run the steps and return the closure, which knows what happened."""
    closure = Closure(params, optimizer, **how)
    for _ in range(steps):
        closure.step()
    return closure
