"""Calls a user's closure and checks that it zeroed the gradients of the pass before."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..maths.shards import Shards

# Numbers so large that a gradient added to them is rounded away.
_MARKS = {torch.float16: 2.0**15}
_MARK = 2.0**100


def with_cleared_gradients(closure: Callable[[], Any], params: Shards) -> Any:
    """closure(), which must clear the gradients of the pass before.

    The first entry of every old gradient is overwritten with a mark. Reads from a device only where
    the closure keeps the tensors, as zero_grad(set_to_none=False) does.

    Raises:
        ConfigError: it did not clear them, or returned a loss and called no backward.
    """
    dense = [p for p in params if p.grad is not None and p.grad.numel() and not p.grad.is_sparse]
    before: list[Tensor] = [p.grad for p in dense]  # type: ignore[misc]
    with torch.no_grad():
        firsts = [g[(0,) * g.ndim] for g in before]
        marks = [_MARKS.get(g.dtype, _MARK) for g in before]
        if firsts:
            torch._foreach_zero_(firsts)
            torch._foreach_add_(firsts, marks)
    loss = closure()
    marked = [
        first == mark
        for p, g, first, mark in zip(dense, before, firsts, marks, strict=True)
        if p.grad is g
    ]
    if marked and bool(torch.stack([m.to(marked[0].device) for m in marked]).any()):
        raise ConfigError(
            "the closure must zero the gradients before it computes them, got one that added to "
            "what was there; call optimizer.zero_grad() first in it, or let Engine do the step, "
            "which accumulates micro-batches."
        )
    differentiable = isinstance(loss, Tensor) and loss.requires_grad
    if params and differentiable and all(p.grad is None for p in params):
        raise ConfigError(
            "the closure must call backward, got a loss and no gradient of any parameter; call "
            "loss.backward() in it, before it returns the loss."
        )
    return loss
