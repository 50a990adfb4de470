"""torch's DistributedDataParallel: every rank holds everything, buckets average gradients."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..optim.replay import Replay
from .backend import Loss
from .plain import Plain
from .ranks import Ranks


class DDP(Ranks, Plain):
    """Plain on every rank, with one gradient all-reduce per pass.

    Norms need no communication, since weights and averaged gradients are the same everywhere.
    The process group must exist. A module that the user has wrapped already is taken as it is, with
    the ranks of its process group.

    DDP sorts its buckets anew after its first pass, and where a number lies in a bucket decides in
    which order the ranks' shares of it are added. So before the first step of every process one
    micro-batch goes forward and backward for nothing, or the first step after a resume would round
    otherwise than the same step of a run that was not interrupted. That pass puts back random
    numbers and buffers; it does show in the state of a comm hook on a DDP of the user's.
    """

    name = "ddp"

    def __init__(self, module: nn.Module, optimizer: Any, *, precision: str = "fp32") -> None:
        inner = getattr(module, "_orig_mod", module)  # of torch.compile
        self._wrapped = inner if isinstance(inner, DistributedDataParallel) else None
        self.group = self._wrapped.process_group if self._wrapped else None
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._given = module
        super().__init__(
            self._wrapped.module if self._wrapped else module, optimizer, precision=precision
        )
        self._sorted = False
        self._broken = False  # a step that was abandoned may have left a pass half reduced

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module in DistributedDataParallel, which also makes all ranks start from rank 0's."""
        if self._wrapped is not None:
            return self._given
        device = next(module.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        self._wrapped = DistributedDataParallel(
            module, device_ids=ids, gradient_as_bucket_view=True
        )
        return self._wrapped

    def backward(self, batches: Sequence[Any], loss: Loss, *, average: bool = True) -> Tensor:
        """See `Backend.backward`."""
        if self._broken:
            self._renew_reducer()
        if not self._sorted:
            self._sort_buckets(batches[0], loss)
        return super().backward(batches, loss, average=average)

    def _sort_buckets(self, batch: Any, loss: Loss) -> None:
        """One pass for DDP's order of gradients. What else it leaves: see the class."""
        with Replay(self.module).again():
            with self.arithmetic():
                value = loss(self.model, batch)
            value.backward()  # the next forward sorts
        self.optimizer.zero_grad()
        self._sorted = True

    def abandon(self) -> None:
        """See `Backend.abandon`."""
        super().abandon()
        self._broken = True

    def _renew_reducer(self) -> None:
        """A new reducer, as when DDP is copied: the old one may wait for the rest of a backward,
        or take the next micro-batch for the last. Local; all settings and comm hooks stay."""
        assert self._wrapped is not None
        self._broken, self._sorted = False, False
        self.optimizer.zero_grad()
        hooks, self._wrapped._comm_hooks = self._wrapped._comm_hooks, []
        self._wrapped.__setstate__(self._wrapped.__getstate__())
        for hook, state in hooks:
            self._wrapped.register_comm_hook(state, hook)

    def no_sync(self) -> AbstractContextManager[Any]:
        """DDP's own no_sync."""
        assert self._wrapped is not None
        return self._wrapped.no_sync()
