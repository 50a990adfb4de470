"""Horovod with whole weights and state on every rank.

Hooks of our own, in place of `DistributedOptimizer`, start a gradient's all-reduce as soon as
backward has accumulated it for the last time, so that it overlaps with the rest of backward. Every
collective has a fixed name: Horovod's default names count calls, and a worker that joins later
would have another count.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from ...errors import ConfigError, RunError
from ...optim.rule import check_choice
from ...optim.seen import Seen
from ..alike import differing
from ..backend import Loss
from ..plain import Plain

COMPRESSIONS = ("none", "fp16")


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in the order of ranks. One object gather."""
    return hvd.allgather_object(value, name="gather")


def start(size: int) -> None:
    """Initialise Horovod. ConfigError if it has another number of ranks than were started."""
    if not hvd.is_initialized():
        hvd.init()
    if hvd.size() != size:
        raise ConfigError(
            f"Horovod must find the {size} ranks that were started, got {hvd.size()}; start with "
            f"horovodrun, or build it with the MPI of this mpirun: bash cluster/horovod/build.sh."
        )


class Horovod(Plain):
    """Plain on every rank, with one gradient all-reduce per pass.

    At construction every rank takes rank 0's weights, buffers and optimizer state. A parameter that
    no loss used has a gradient of zero, as with `DistributedOptimizer`.

    Args:
        module, optimizer, precision: as of `Plain`. The optimizer's base may be an existing
            `hvd.DistributedOptimizer`, which then reduces gradients with its own settings.
        compression: "fp16" sends gradients in 16 bits; "none" in fp32, at every precision.

    Raises:
        ConfigError: a setting is not allowed. RunError: ranks hold different weights.
    """

    name = "horovod"
    ranks_may_join = True

    def __init__(
        self,
        module: nn.Module,
        optimizer: Any,
        *,
        precision: str = "fp32",
        compression: str = "none",
    ) -> None:
        check_choice("compression", compression, COMPRESSIONS)
        if not hvd.is_initialized():
            hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        base = optimizer.base_optimizer
        self.horovod_optimizer: Any = base if hasattr(base, "skip_synchronize") else None
        self._fp16 = compression == "fp16"
        self._sending = False
        self._unfinished = False  # an abandoned pass may have sent some gradients
        self._sent: dict[Tensor, tuple[int, Tensor]] = {}  # parameter -> (handle, sent tensor)
        super().__init__(module, optimizer, precision=precision)
        self._names = {p: n for n, p in self._named()}
        self._broadcast()
        self.prepare()
        check_alike(module)

    def _broadcast(self) -> None:
        """Rank 0's state, then its weights, which also undoes changes of weights by the former.

        Not `hvd.broadcast_optimizer_state`, which steps an empty optimizer on zero gradients, so
        that weights decay on ranks without state.
        """
        filled = hvd.allgather_object(bool(self.optimizer.state), name="start.filled")
        if any(filled):
            self._share_state()
        hvd.broadcast_parameters(self.module.state_dict(), root_rank=0)

    def _share_state(self) -> None:
        state = self.optimizer.state_dict() if self.rank == 0 else None
        state = hvd.broadcast_object(state, root_rank=0, name="start.state")
        if self.rank:
            self.optimizer.load_state_dict(state)

    # Gradients.

    def prepare(self) -> None:
        """Hook every parameter, unless a `DistributedOptimizer` has done so."""
        if self.horovod_optimizer is None:
            for p in self._names:
                p.register_post_accumulate_grad_hook(self._send)

    def _send(self, param: Tensor) -> None:
        """Autograd's hook: must return nothing."""
        if not self._sending:
            return
        name = self._names[param]
        if param in self._sent:
            raise RunError(
                f"{name} got its gradient in two parts of one backward, the first is on its way; "
                f"use checkpoint(..., use_reentrant=False)."
            )
        if param.grad is None:  # another rank may have used it
            param.grad = torch.zeros_like(param)
        wire = self._wire(param.grad)
        self._sent[param] = hvd.allreduce_async_(wire, name=f"grad.{name}", op=hvd.Average), wire

    def _wire(self, grad: Tensor) -> Tensor:
        """The tensor to send; `grad` itself if its dtype is right. Horovod cannot add bf16."""
        dtype = torch.float16 if self._fp16 else torch.promote_types(grad.dtype, torch.float32)
        return grad.to(dtype)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, hooks send nothing."""
        sending, self._sending = self._sending, False
        try:
            yield
        finally:
            self._sending = sending

    def climbing_ranks(self) -> list[int]:
        """See `Backend.climbing_ranks`. Some ranks would need a process set of Horovod's, which
        must be made at `hvd.init()`, and does not survive a change of workers."""
        return sorted({1, self.size})

    def backward(
        self,
        batches: Sequence[Any],
        loss: Loss,
        *,
        average: bool = True,
        onto: dict[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if self._unfinished:  # every rank sends the rest, or ranks would wait for each other
            self.finish_gradients(average=True)
            self._unfinished = False
        if self.horovod_optimizer is not None:  # it counts backwards, and sends at the last
            self.horovod_optimizer.set_backward_passes_per_step(len(batches) + (not average))
        self._sending = average
        try:
            return super().backward(batches, loss, average=average, onto=onto)
        finally:
            self._sending = False

    def finish_gradients(self, *, average: bool) -> None:
        """Wait for the means."""
        if not average:
            return
        if self.horovod_optimizer is not None:
            self.horovod_optimizer.synchronize()
            return
        self._sending = True
        for param in self._names:
            if param not in self._sent:
                self._send(param)
        for param, (handle, wire) in self._sent.items():
            wait(handle)
            if wire is not param.grad:
                assert param.grad is not None
                param.grad.copy_(wire)
        self._sent.clear()

    def abandon(self) -> None:
        """See `Backend.abandon`. The next pass completes these reductions, on all ranks."""
        super().abandon()
        self._unfinished = True

    def update(self) -> Seen:
        """See `Backend.update`. A user's DistributedOptimizer has nothing left to reduce."""
        theirs = self.horovod_optimizer
        with nullcontext() if theirs is None else theirs.skip_synchronize():
            return super().update()

    # Other collectives.

    def average_(self, tensors: Sequence[Tensor], neighbours: int | None = None) -> None:
        """One all-reduce of all tensors together, over all ranks."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        wait(hvd.allreduce_async_(flat, name="average", op=hvd.Average))
        for t, new in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(new.view_as(t))

    def mean(self, numbers: Tensor) -> Tensor:
        """One small all-reduce."""
        name = f"mean.{tuple(numbers.shape)}.{numbers.dtype}"
        return wait(hvd.allreduce_async(numbers.detach(), name=name, op=hvd.Average))

    def gather(self, value: Any) -> list[Any]:
        """One object gather."""
        return gather(value)

    def after_load(self) -> None:
        """See `StoredLayers.after_load`. RunError if ranks read different weights."""
        check_alike(self.module)


_POLL_INTERVAL = 1e-4  # seconds


def wait(handle: int) -> Tensor:
    """`hvd.synchronize`, which polls without a pause, with a sleep between polls.

    That leaves the core to Horovod's own thread, which does the sending, and to the loader's. With
    3 ranks of a tiny model on 2 cores over gloo, steps take two thirds of the time and checkpoints
    a quarter; with 2 ranks up to a third more.
    """
    while not hvd.poll(handle):
        time.sleep(_POLL_INTERVAL)
    return hvd.synchronize(handle)


def check_alike(module: nn.Module) -> None:
    """RunError, on every rank, naming the first layer whose bits are not the same on all ranks.

    One all-reduce of a few numbers per layer.
    """
    named = list(module.named_parameters())
    differ = differing(
        named, lambda x: wait(hvd.allreduce_async(x.cpu(), name="alike", op=hvd.Max))
    )
    if differ:
        raise RunError(
            f"ranks must hold the same weights, got different ones in {len(differ)} of "
            f"{len(named)} layers, first {differ[0]}; resume all ranks from one checkpoint."
        )
