"""torch's DistributedDataParallel: all weights on every rank, gradients averaged in buckets."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError
from ..optim.replay import Replay
from .backend import Loss
from .plain import Plain
from .ranks import TorchRanks
from .wrappers import uncompiled


class DDP(TorchRanks, Plain):
    """Plain on every rank, with one gradient all-reduce per pass.

    Norms need no communication, since weights and averaged gradients are the same everywhere.
    The process group must exist. A module that is already in DDP is not wrapped again; its ranks
    are those of its process group.

    DDP reorders its buckets after its first pass, and an entry's position in its bucket decides in
    which order the ranks' gradients are added. So the first step of a process begins with a warm-up
    forward and backward, after which the buckets have their final order. Otherwise the first step
    after a resume would round differently from the same step of an uninterrupted run. The warm-up
    restores random states and buffers; it changes the state of a comm hook on the user's own DDP.
    """

    name = "ddp"

    def __init__(self, module: nn.Module, optimizer: Any, *, precision: str = "fp32") -> None:
        inner = uncompiled(module)
        self._ddp = inner if isinstance(inner, DistributedDataParallel) else None
        self.group = self._ddp.process_group if self._ddp else None
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._user_module = module
        super().__init__(self._ddp.module if self._ddp else module, optimizer, precision=precision)
        self._warmed_up = False
        self._half_reduced = False  # an abandoned step may have left a pass so

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module in DistributedDataParallel, which also makes all ranks start from rank 0's."""
        if self._ddp is not None:
            return self._user_module
        device = next(module.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        self._ddp = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
        return self._ddp

    def backward(
        self,
        batches: Sequence[Any],
        loss: Loss,
        *,
        average: bool = True,
        onto: dict[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if self._half_reduced:
            self._renew_reducer()
        if not self._warmed_up:
            self._warm_up(batches[0], loss)
        return super().backward(batches, loss, average=average, onto=onto)

    def _warm_up(self, batch: Any, loss: Loss) -> None:
        """One forward and backward, for the final order of DDP's buckets: see the class.

        ConfigError for a loss that does not call the module that it is given: DDP would average
        nothing, and every rank would train alone.
        """
        assert self._ddp is not None
        called: list[bool] = []
        with Replay(self.module).again(), self._watched(called):
            with self.arithmetic():
                value = loss(self.model, batch)
            value.backward()  # the next forward reorders
        self.optimizer.zero_grad()
        if not called:
            raise ConfigError(
                "under DistributedDataParallel loss(model, batch) must call the model that it is "
                "given, got one that does not: each rank would train alone; call its first "
                "argument, not model.module or a variable outside."
            )
        self._warmed_up = True

    @contextmanager
    def _watched(self, called: list[bool]) -> Iterator[None]:
        """`called` gets an entry for each forward of DDP, which prepares its reduction."""
        assert self._ddp is not None
        if self.model is not self._ddp:  # in torch.compile's wrapper, whose graph would keep this
            called.append(True)
            yield
            return
        forward = self._ddp.forward

        def noted(*args: Any, **how: Any) -> Any:
            called.append(True)
            return forward(*args, **how)

        self._ddp.forward = noted  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self._ddp.forward

    def climbing_ranks(self) -> list[int]:
        """See `Backend.climbing_ranks`. With find_unused_parameters not all ranks: a backward that
        is reduced ends DDP's list of used layers, and the sum of a layer that the last group does
        not use would stay this rank's own."""
        assert self._ddp is not None
        every = super().climbing_ranks()
        return every[:-1] if self._ddp.find_unused_parameters and self.size > 1 else every

    def abandon(self) -> None:
        super().abandon()
        self._half_reduced = True

    def _renew_reducer(self) -> None:
        """A new reducer, as when DDP is copied: the old one may wait for the rest of a backward,
        or take the next micro-batch for the last. Local; all settings and comm hooks stay."""
        assert self._ddp is not None
        self._half_reduced, self._warmed_up = False, False
        self.optimizer.zero_grad()
        hooks, self._ddp._comm_hooks = self._ddp._comm_hooks, []
        self._ddp.__setstate__(self._ddp.__getstate__())
        for hook, state in hooks:
            self._ddp.register_comm_hook(state, hook)

    def no_sync(self) -> AbstractContextManager[Any]:
        """DDP's own no_sync."""
        assert self._ddp is not None
        return self._ddp.no_sync()
