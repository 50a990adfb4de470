"""The second pass of a look draws the first one's random numbers and leaves buffers unchanged."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that a forward in training mode changes: running means, variances, counts."""
    normalised = [m for m in model.modules() if getattr(m, "track_running_stats", False)]
    return [b for m in normalised for b in m.buffers(recurse=False) if b is not None]


_LARGE = 2**16  # entries; whole numbers beyond are tables and packed weights, not counts


@dataclass
class _Buffer:
    """A buffer at one moment: its module and name, the tensor, and a copy of its entries."""

    owner: nn.Module
    name: str
    tensor: Tensor
    copy: Tensor

    def now(self) -> Tensor | None:
        """The buffer of that name now, if it has the same shape."""
        tensor = getattr(self.owner, self.name)
        return tensor if tensor is not None and tensor.shape == self.copy.shape else None


def _may_change(b: Tensor) -> bool:
    """False for tensors that forward cannot write to, and for large tables of whole numbers."""
    overlaps = any(s == 0 and n > 1 for s, n in zip(b.stride(), b.shape, strict=True))
    return not (overlaps or b.is_inference()) and (b.is_floating_point() or b.numel() < _LARGE)


def _buffers(model: nn.Module | None) -> list[_Buffer]:
    if model is None:
        return []
    return [
        _Buffer(owner, name, b, b.detach().clone())
        for owner in model.modules()
        if owner._buffers  # of a ViT none; `named_buffers` of all modules takes long, each step
        for name, b in owner.named_buffers(recurse=False)
        if not is_lazy(b) and b.layout == torch.strided and _may_change(b)
    ]


@torch.no_grad()
def _put_back(buffers: list[_Buffer]) -> None:
    for b in buffers:
        if getattr(b.owner, b.name) is not b.tensor:  # forward has replaced it
            setattr(b.owner, b.name, b.tensor)
        b.tensor.copy_(b.copy)


def _random() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def _set_random(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    random.setstate(state[2])
    np.random.set_state(state[3])


class Replay:
    """Saves random states and buffers before a pass, to run the pass once more.

    Covers torch's default generators of the CPU and of every CUDA device, Python's `random` and
    NumPy's global generator; all of their states are on the host. A generator of the caller's own
    and buffers outside `model` are not covered: draws from such a generator differ between the two
    passes. One state covers all micro-batches, since both passes draw in the same order.

    Args:
        model: whose buffers (BatchNorm statistics, spectral_norm's vectors) are kept as one pass
            would leave them; None for none.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self._before = _random()
        self._buffers_before = _buffers(model)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside: the random numbers of the first pass. After: states as one pass leaves them."""
        after = _random()
        buffers = _buffers(self.model)
        _set_random(self._before)
        try:
            yield
        finally:
            _set_random(after)
            _put_back(buffers)

    @torch.no_grad()
    def undo(self) -> None:
        """After an exception: states and buffers as before the first pass."""
        _set_random(self._before)
        _put_back(self._buffers_before)

    @torch.no_grad()
    def undo_buffers(self, unless: Tensor) -> None:
        """After a skipped step: buffers as before it. `unless`: 0-dim bool, not read from a GPU."""
        if not unless.is_cuda and bool(unless):
            return
        for b in self._buffers_before:
            now = b.now()
            if now is not None:
                now.copy_(torch.where(unless.to(now.device), now, b.copy))
