"""Collectives of small tensors and objects in torch's process groups."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError


def gather(value: Any, group: Any = None) -> list[Any]:
    """`value` of every rank of a process group, in the order of ranks. One object gather."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def average_(tensors: Sequence[Tensor], group: Any) -> None:
    """Replace whole tensors by their mean over a process group: one all-reduce of all together."""
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for t, new in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(new.view_as(t))


def refuse_step() -> None:
    """In place of `optimizer.step`, once its parameters are this rank's shards: ConfigError."""
    raise ConfigError(
        "step must be left to Engine once it has sharded the optimizer, whose gradients are not "
        "where backward leaves them, got optimizer.step; call engine.step(micro_batches)."
    )


class TorchRanks:
    """`size` ranks of torch's process group, each with its tensors on `device`.

    A mixin: it stands before the class of one process, whose methods it replaces.
    """

    size: int
    ranks_may_join = False
    group: dist.ProcessGroup | None = None  # of them all; None: the default one
    device: torch.device

    def mean(self, numbers: Tensor) -> Tensor:
        """One small all-reduce."""
        numbers = numbers.to(self.device, copy=True)
        dist.all_reduce(numbers, group=self.group)
        return numbers / self.size

    def average_(self, tensors: Sequence[Tensor], neighbours: int | None = None) -> None:
        """Replace whole tensors by their mean: one all-reduce of all together.

        neighbours: only over the block of so many ranks in a row that this one is in.
        """
        if neighbours in (None, self.size):
            average_(tensors, self.group)
        else:
            average_(tensors, self._block(neighbours))

    def _block(self, size: int) -> dist.ProcessGroup:
        """The process group of this rank's block of `size` ranks; made at the first call."""
        blocks = self.__dict__.setdefault("_blocks", {})
        if size not in blocks:
            own = dist.get_rank(self.group)
            members = range(own - own % size, own - own % size + size)
            of_all = dist.get_process_group_ranks(self.group)
            blocks[size] = dist.new_group(
                [of_all[r] for r in members], use_local_synchronization=True
            )
        return blocks[size]

    def gather(self, value: Any) -> list[Any]:
        """One object gather."""
        return gather(value, self.group)
