"""What a step saw, as numbers that the host has not read yet."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..maths.look import Given
from ..maths.shards import Reduce, Shards, dots


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
    def of(cls, given: Given, *, look: bool, kept2: Tensor | None, eps_cosine: Tensor | None):
        """From the squared sums of a step."""
        return cls(
            look=look,
            finite=given.finite,
            grad_norm=given.grad2.sqrt(),
            update_norm=given.given2.sqrt() * given.scale,
            gv_norm=None if kept2 is None else kept2.sqrt(),
            eps_cosine=eps_cosine,
        )


def perturb_seen_in_(weight: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
    """weight += eps. Returns [3]: (a.eps, a.a, eps.eps), where a is what `dtype` shows of it."""
    before = weight.to(dtype)
    weight.add_(eps)
    applied = (weight.to(dtype).float() - before.float()).to(eps.dtype)
    pairs = ((applied, eps), (applied, applied), (eps, eps))
    return torch.cat([dots([x], [y]) for x, y in pairs])
