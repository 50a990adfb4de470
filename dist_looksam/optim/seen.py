"""The statistics of one step, as tensors that the host has not read yet."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..maths.look import Update
from ..maths.shards import Reduce, Shards


class Probe(Protocol):
    """Called at every look, before the gradients are overwritten."""

    def __call__(
        self, *, step: int, grads: Shards, sam: Shards, update: Update, reduce: Reduce
    ) -> None: ...


@dataclass(frozen=True)
class Seen:
    """Statistics of one step. Tensors are 0-dim, on the device, and not yet read by the host.

    Attributes:
        look: whether the second gradient was computed.
        finite: False where a gradient was not finite, so that the step changed nothing.
        grad_norm: ||g||, neither clipped nor scaled.
        update_norm: norm of the gradient that the base got: after look or reuse, after clipping.
        gv_norm: ||g_v||; None if this step used none.
        eps_cosine: between applied and intended perturbation; None if both have the same dtype.
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
    def of(
        cls, update: Update, *, look: bool, gv_sq_norm: Tensor | None, eps_cosine: Tensor | None
    ) -> "Seen":
        """From the squared norms of a step."""
        return cls(
            look=look,
            finite=update.finite,
            grad_norm=update.grad_sq_norm.sqrt(),
            update_norm=update.update_sq_norm.sqrt() * update.scale,
            gv_norm=None if gv_sq_norm is None else gv_sq_norm.sqrt(),
            eps_cosine=eps_cosine,
        )

    @classmethod
    def skipped(cls, *, look: bool) -> "Seen":
        """A step that was skipped for a gradient that is not finite."""
        unknown = torch.tensor(torch.nan)
        return cls(look, torch.tensor(False), unknown, unknown)
