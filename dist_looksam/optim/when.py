"""When to look, inside a window of steps: at every k-th step, or where the gradient is large.

A decider is asked once or more in each step, before the first pass, and gets the statistics of the
step at its end. All that it decides from is the same on all ranks, so all ranks decide alike.
"""

import math
from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor

from .later import Later
from .seen import Seen

DECAY = 0.9  # of the running mean and variance, per step, as in arXiv:2304.14647
LAG = 2  # step t + LAG is decided from ||g_t||


class Decider(Protocol):
    """Decides which steps of the window look. `k`: steps per look. `first`: the window's first;
    `end`: the first after it, None: there is none."""

    def __init__(self, *, k: int, first: int, end: int | None = None) -> None: ...

    def due(self, step: int) -> bool:
        """True if this step looks. Steps come in order; the same step may be asked again."""

    def record(self, step: int, seen: Seen) -> None:
        """The statistics of a step that has ended; no read from a GPU."""

    def watched(self) -> Tensor | None:
        """After `record`: a number of that step, 0-dim, that decides later looks; None: none."""

    def agree(self, number: Tensor) -> None:
        """In place of `watched()`: a number with the same bits on all ranks. No read from a GPU."""

    def state(self) -> dict[str, Any]:
        """Numbers to continue from, for a checkpoint; may read from the device."""

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`; {}: from the beginning."""


class Periodic:
    """Looks where (step - first) mod k = 0."""

    def __init__(self, *, k: int, first: int, end: int | None = None) -> None:
        self.k, self.first = k, first

    def due(self, step: int) -> bool:
        return (step - self.first) % self.k == 0

    def record(self, step: int, seen: Seen) -> None:
        pass

    def watched(self) -> Tensor | None:
        return None

    def agree(self, number: Tensor) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


class Adaptive:
    """Looks where ||g||^2 is unusually large: AE-SAM, Jiang et al., arXiv:2304.14647.

    E and V are the running mean and variance of ||g||^2, over all steps. Step t + 2 looks if
    ||g_t||^2 >= E + c sqrt(V); with V = 0, if 0 >= c. The paper decides step t from ||g_t||^2, and
    lowers c by a plan. Here c = looks - steps / k, both counted within the window, and anew
    where a checkpoint is of another k: it rises where looks were too many. After N steps the share
    of looks is 1/k + c / N, and |c| < 4.2, as no ||g||^2 is more than sqrt(10) deviations from E:
    the cost is held.

    Why two steps: ||g_t||^2 is known when the device ends step t, while the host already issues
    step t + 1. A decision about t + 1 must stand before its first pass (where groups of samples
    climb apart) and would wait for the device to run dry; one about t + 2 finds the number there.
    Steps that were skipped, in whichever pass, count in no mean.

    Ranks may have computed ||g_t|| by themselves, each from the same gradient. On devices of two
    kinds its last bit could differ, and one rank would look alone. So `Engine` gives all of them
    the mean, which it sends with the mean loss.
    """

    _mean: float | None
    _variance: float
    _looks: int
    _steps: int
    _step: int  # the newest that was asked about, and the answer
    _due: bool
    _pending: deque[tuple[int, Later]]  # steps and their ||g||, not yet in the mean
    _watched: Tensor | None = None  # the newest of these

    def __init__(self, *, k: int, first: int, end: int | None = None) -> None:
        self.k, self.first, self.end = k, first, math.inf if end is None else end
        self.load({})

    def due(self, step: int) -> bool:
        if step != self._step:
            z = -math.inf
            while self._pending and self._pending[0][0] <= step - LAG:
                z = self._standardised(float(self._pending.popleft()[1].read()))
            self._step, self._due = step, z >= self._looks - self._steps / self.k
        return self._due

    def _standardised(self, norm: float) -> float:
        """(||g||^2 - E) / sqrt(V), after ||g||^2 has gone into E and V; -inf of a skipped step."""
        square = norm * norm
        if not math.isfinite(square):
            return -math.inf
        if self._mean is None:
            self._mean = square
        self._mean += (1 - DECAY) * (square - self._mean)
        difference = square - self._mean
        self._variance = DECAY * self._variance + (1 - DECAY) * difference * difference
        return difference / math.sqrt(self._variance) if self._variance > 0 else 0.0

    def record(self, step: int, seen: Seen) -> None:
        self._watched = _norm(seen)
        self._pending.append((step, Later(self._watched)))
        if self.first <= step < self.end:
            self._steps += 1
            self._looks += seen.look

    def watched(self) -> Tensor | None:
        return self._watched

    def agree(self, number: Tensor) -> None:
        step, _ = self._pending.pop()
        self._pending.append((step, Later(number)))

    def state(self) -> dict[str, Any]:
        pending = [[step, float(norm.read())] for step, norm in self._pending]
        return {
            "mean": self._mean,
            "variance": self._variance,
            "looks": self._looks,
            "steps": [self._steps, self.k],  # no key of its own: see `StepCounters.counters`
            "step": self._step,
            "due": self._due,
            "pending": [each for each in pending if math.isfinite(each[1])],
        }

    def load(self, state: dict[str, Any]) -> None:
        self._mean = state.get("mean")
        self._variance = float(state.get("variance", 0.0))
        steps = state.get("steps", 0)
        counted, k = steps if isinstance(steps, list) else (steps, self.k)  # older ones have no k
        same = int(k) == self.k
        self._looks, self._steps = (int(state.get("looks", 0)), int(counted)) if same else (0, 0)
        self._step, self._due = int(state.get("step", -1)), bool(state.get("due", False))
        self._pending = deque(
            (int(step), Later(torch.tensor(norm, dtype=torch.float64)))
            for step, norm in state.get("pending", ())
        )


def _norm(seen: Seen) -> Tensor:
    """||g|| of a step, NaN if the step was skipped."""
    norm, finite = seen.grad_norm, seen.finite
    if finite.device == norm.device:
        return torch.where(finite, norm, torch.nan)
    return norm if bool(finite) else torch.full_like(norm, torch.nan)  # on the host: ZeRO in fp16


DECIDERS: dict[str, type[Decider]] = {"periodic": Periodic, "adaptive": Adaptive}
