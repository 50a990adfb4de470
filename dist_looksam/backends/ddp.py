"""torch's DistributedDataParallel: every rank holds everything, buckets average gradients."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .plain import Plain


class DDP(Plain):
    """Plain on every rank, with one gradient all-reduce per pass.

    Norms need no communication, since weights and averaged gradients are the same everywhere.
    The process group must exist. A module that the user has wrapped already is taken as it is.
    """

    name = "ddp"

    def __init__(self, module: nn.Module, optimizer: Any, *, precision: str = "fp32") -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._wrapped = module if isinstance(module, DistributedDataParallel) else None
        super().__init__(
            self._wrapped.module if self._wrapped else module, optimizer, precision=precision
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module in DistributedDataParallel, which also makes all ranks start from rank 0's."""
        if self._wrapped is None:
            device = next(module.parameters()).device
            ids = [device.index] if device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(
                module, device_ids=ids, gradient_as_bucket_view=True
            )
        return self._wrapped

    def quiet(self) -> AbstractContextManager[Any]:
        """DDP's own no_sync."""
        assert self._wrapped is not None
        return self._wrapped.no_sync()

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """One all-reduce of all tensors together."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for t, new in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(new.view_as(t))

    def gather(self, thing: Any) -> list[Any]:
        """One object gather."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing)
        return found

    def mean(self, numbers: Tensor) -> Tensor:
        """One small all-reduce."""
        numbers = numbers.clone()
        dist.all_reduce(numbers)
        return numbers / self.size
