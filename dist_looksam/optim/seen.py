"""What a step saw, as numbers that the host has not read yet."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from ..maths.ascent import Perturbation
from ..maths.look import Update
from ..maths.shards import Reduce, Shards, products


class Probe(Protocol):
    """Called on every look, before anything is overwritten."""

    def __call__(
        self, *, step: int, grads: Shards, sam: Shards, share: Tensor, reduce: Reduce
    ) -> None: ...


@dataclass(frozen=True)
class Seen:
    """What one step did. Tensors are 0-dim, on the device, and not yet read by the host.

    grad_norm     ||g||, neither clipped nor scaled.
    update_norm   norm of the gradient that the base got: after look or reuse, after clipping.
    gv_norm       ||g_v||; None where the method has none at this step.
    eps_cosine    between applied and intended perturbation; None unless asked for.
    """

    look: bool
    finite: Tensor
    grad_norm: Tensor
    update_norm: Tensor
    gv_norm: Tensor | None = None
    eps_cosine: Tensor | None = None

    @property
    def gv_ratio(self) -> Tensor | None:
        """||g_v|| / ||g||."""
        return None if self.gv_norm is None else self.gv_norm / self.grad_norm

    @classmethod
    def of(cls, given: Update, *, look: bool, gv_sq_norm: Tensor | None, eps_cosine: Tensor | None):
        """From the squared sums of a step."""
        return cls(
            look=look,
            finite=given.finite,
            grad_norm=given.grad2.sqrt(),
            update_norm=given.update_sq_norm.sqrt() * given.scale,
            gv_norm=None if gv_sq_norm is None else gv_sq_norm.sqrt(),
            eps_cosine=eps_cosine,
        )


def perturb_(
    weights: Shards,
    grads: Shards,
    climb: Perturbation,
    dtype: torch.dtype | None,
    *,
    first: int = 0,
) -> Tensor | None:
    """weights += eps, where `first` is the number of the first of these layers. Returns the sums of
    `perturb_measured_`, if forward sees the weights in another `dtype`."""
    if dtype is not None:
        eps = (climb.eps(i, g) for i, g in enumerate(grads, first))
        return perturb_measured_(weights, eps, dtype)
    for i, (w, g) in enumerate(zip(weights, grads, strict=True), first):
        climb.add_(i, w, g)
    return None


_AT_ONCE = 2**21  # entries of which copies are made at a time


def perturb_measured_(weights: Shards, eps: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """weights += eps. Returns [3, P]: local sums of (a.eps, a.a, eps.eps), where a is what `dtype`
    shows of eps."""
    if not weights:
        return torch.zeros(3, 0, dtype=torch.float64)
    coming, found = iter(eps), []
    for some in _batches(weights):
        steps = list(islice(coming, len(some)))
        before = _shown(some, dtype, steps)
        torch._foreach_add_(some, steps)
        applied = _shown(some, dtype, steps)
        torch._foreach_sub_(applied, before)
        found.append(products((applied, steps), (applied, applied), (steps, steps)))
    return torch.cat(found, -1)


def _batches(weights: Shards) -> Iterator[list[Tensor]]:
    """One after another, of so many layers together as have _AT_ONCE entries, or of one."""
    batch: list[Tensor] = []
    size = 0
    for w in weights:
        if batch and size + w.numel() > _AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(w)
        size += w.numel()
    yield batch


def _shown(weights: Shards, dtype: torch.dtype, like: Shards) -> list[Tensor]:
    """The weights as `dtype` shows them, in the type of `like`."""
    low = [torch.empty_like(w, dtype=dtype) for w in weights]
    shown = [torch.empty_like(w, dtype=x.dtype) for w, x in zip(weights, like, strict=True)]
    torch._foreach_copy_(low, list(weights))
    torch._foreach_copy_(shown, low)
    return shown
