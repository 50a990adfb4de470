"""The second pass sees what the first saw: the same random numbers, and statistics left alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that a forward in training mode changes: running means, variances, counts."""
    found: list[Tensor] = []
    for module in model.modules():
        if getattr(module, "track_running_stats", False):
            found += [b for b in module.buffers(recurse=False) if b is not None]
    return found


class Replay:
    """Remembers the state of torch's random numbers before a pass, to run the pass once more.

    One state covers all micro-batches, since both passes draw in the same order.

    Args:
        model: whose BatchNorm statistics are kept as one pass would leave them; None for none.
        cuda: also the generator of the current CUDA device.
    """

    def __init__(self, model: nn.Module | None, *, cuda: bool) -> None:
        self.statistics = running_statistics(model) if model is not None else []
        self.cuda = cuda
        self._before = self._random()
        self._statistics_before = [b.clone() for b in self.statistics]

    def _random(self) -> tuple[Tensor, Tensor | None]:
        return torch.get_rng_state(), torch.cuda.get_rng_state() if self.cuda else None

    def _set_random(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1])

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside: the random numbers of the first pass. After: everything as one pass leaves it."""
        after = self._random()
        statistics = [b.clone() for b in self.statistics]
        self._set_random(self._before)
        try:
            yield
        finally:
            self._set_random(after)
            with torch.no_grad():
                for buffer, kept in zip(self.statistics, statistics, strict=True):
                    buffer.copy_(kept)

    @torch.no_grad()
    def undo(self) -> None:
        """Everything as before the first pass, after an exception."""
        self._set_random(self._before)
        for buffer, before in zip(self.statistics, self._statistics_before, strict=True):
            buffer.copy_(before)

    @torch.no_grad()
    def undo_statistics(self, unless: Tensor) -> None:
        """A skipped step leaves the statistics as they were before it; `unless`: 0-dim bool."""
        for buffer, before in zip(self.statistics, self._statistics_before, strict=True):
            buffer.copy_(torch.where(unless.to(buffer.device), buffer, before))
