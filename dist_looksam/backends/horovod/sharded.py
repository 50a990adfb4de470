"""Horovod with ZeRO stage 1: whole weights on every rank, state for the rank's own slice only.

The layers of a param group are flattened into one row, padded to equal slices; their gradients into
another. A rank's slice of a row is the optimizer's parameter: a view of the row, so that a step
writes where forward reads, and one all-gather completes the row. A look costs one more
reduce-scatter and one more all-gather, since a rank has g of its own slice only and can perturb
only that. Restoring needs no communication: the gather after the base's step does both. With eps of
its own gradient, which a rank has whole, nothing is gathered for eps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from ...errors import ConfigError
from ...maths.together import Groups
from ...optim.entrywise import check_entrywise
from ...optim.seen import Seen
from ..backend import Loss
from ..flat import Flat, cut
from ..names import name_in
from ..ranks import refuse_step
from ..stored import refuse_state_dict, watch_first_step
from ..whole_groups import WholeGroups
from .whole import Horovod, wait


@dataclass(frozen=True)
class Row:
    """The layers of one param group. `weights` and `grads` are whole and padded."""

    layers: tuple[Tensor, ...]
    weights: Tensor
    grads: Tensor
    flat: Flat  # the own slice of `weights`

    def cut(self, row: Tensor) -> list[Tensor]:
        """The layers in a tensor laid out as the row, as views of their shapes."""
        sizes = [p.numel() for p in self.layers]
        parts = row[: sum(sizes)].split(sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.layers, strict=True)]


class HorovodSharded(Horovod, WholeGroups):
    """`Horovod` with the base's state and g_v for 1 / ranks of every param group.

    Args: as of `Horovod`. The rank's slices replace the layers in the optimizer's groups; its state
        must be empty, and its base not one of Horovod's and none that needs whole layers.
    """

    def _share_state(self) -> None:
        raise ConfigError(
            "a sharded optimizer must start without state, got some; load a checkpoint after "
            "the backend is made."
        )

    def prepare(self) -> None:
        """Flatten the layers into rows. Without hooks: nothing is sent before a pass has ended."""
        if self.horovod_optimizer is not None:
            raise ConfigError(
                "zero_stage 1 needs a plain base optimizer, got hvd.DistributedOptimizer; "
                "leave it out, since gradients are reduced here."
            )
        base: Any = self.optimizer.base_optimizer
        check_entrywise(base, self.device)
        self.rows = [self._row(n, group) for n, group in enumerate(base.param_groups)]
        self.flats = [row.flat for row in self.rows]
        flat_of = {flat.master: flat for flat in self.flats}
        self.optimizer.bind(
            pieces=lambda param, like: flat_of[param].views(like),
            reduce=self.reduce,
            visible_dtype=self.dtype,
            driver=refuse_step,
        )
        self.replicas = (1, 0)
        refuse_state_dict(base)
        watch_first_step(self)
        self._perturbed_elsewhere = False  # other ranks' slices of the rows are perturbed

    def _row(self, number: int, group: dict[str, Any]) -> Row:
        layers = tuple(group["params"])
        share = -(-sum(p.numel() for p in layers) // self.size)
        weights = torch.zeros(share * self.size, device=self.device, dtype=layers[0].dtype)
        at = 0
        for p in layers:
            view = weights[at : at + p.numel()].view(p.shape)
            view.copy_(p.detach())
            p.data = view
            at += p.numel()
        own = weights[self.rank * share : (self.rank + 1) * share]
        names = {id(p): name_in(self.module, self._names[p]) for p in layers}
        group["params"] = [own]
        flat = cut(layers, names, own, number, self.rank * share)
        return Row(layers, weights, torch.zeros_like(weights), flat)

    def reduce(self, sums: Tensor) -> Tensor:
        """Add over the ranks, which split every layer. One small all-reduce."""
        return wait(hvd.allreduce_async(sums, name=f"sums.{tuple(sums.shape)}", op=hvd.Sum))

    # Gradients.

    def backward(
        self,
        batches: Sequence[Any],
        loss: Loss,
        *,
        average: bool = True,
        onto: dict[Tensor, Tensor] | None = None,
    ) -> Tensor:
        for row in self.rows:
            row.grads.zero_()
            for p, grad in zip(row.layers, row.cut(row.grads), strict=True):
                p.grad = grad  # backward adds in place
        average = average and onto is None  # `end_group` averages, once the sum is complete
        return super().backward(batches, loss, average=average)

    def finish_gradients(self, *, average: bool) -> None:
        """One reduce-scatter per param group: the mean on the own slice."""
        if average:
            for row, mean in zip(self.rows, self._scatter(), strict=True):
                row.flat.master.grad = mean

    def _scatter(self) -> list[Tensor]:
        """The own slice of the mean of every row's gradients over ranks."""
        handles = [
            hvd.reducescatter_async(self._wire(row.grads), name=f"grad.{n}", op=hvd.Average)
            for n, row in enumerate(self.rows)
        ]
        return [wait(h).to(r.grads.dtype) for r, h in zip(self.rows, handles, strict=True)]

    def gradients(self) -> list[Tensor]:
        """See `Plain.gradients`: means of slices after an averaging pass, else this rank's own."""
        masters = [flat.master.grad for flat in self.flats]
        return [row.grads if g is None else g for row, g in zip(self.rows, masters, strict=True)]

    # Groups of samples.

    def averages(self, groups: Groups) -> bool:
        """See `Backend.averages`: a reduce-scatter would leave the own slice."""
        return False

    def own_layers(self) -> tuple[list[Tensor], list[Tensor]]:
        """See `WholeGroups.own_layers`."""
        layers = [p for row in self.rows for p in row.layers]
        return layers, [g for row in self.rows for g in row.cut(row.grads)]

    def clear_own(self) -> None:
        """See `WholeGroups.clear_own`: `backward` clears them."""

    def mean_shards(self, layers: list[Tensor]) -> list[Tensor]:
        """See `WholeGroups.mean_shards`. One reduce-scatter per param group."""
        _, grads = self.own_layers()
        torch._foreach_copy_(grads, layers)
        return self._scatter()

    def take_sum(self) -> dict[Tensor, Tensor]:
        """See `Backend.take_sum`: `end_group` adds the last group's to it."""
        return {}

    def perturb_group(self, groups: Groups) -> None:
        self.perturb_whole(groups)

    def end_group(self, groups: Groups, *, last: bool) -> None:
        means = self.end_whole(groups, last=last)
        if last:
            for flat, mean in zip(self.flats, means, strict=True):
                flat.master.grad = mean

    # The two-gradient step.

    @torch.no_grad()
    def publish(self) -> None:
        """Complete the rows with all ranks' slices: one all-gather per param group."""
        handles = [
            hvd.allgather_async(row.flat.master, name=f"weight.{n}")
            for n, row in enumerate(self.rows)
        ]
        for row, handle in zip(self.rows, handles, strict=True):
            row.weights.copy_(wait(handle))
        torch.clear_autocast_cache()
        self._perturbed_elsewhere = False

    def perturb(self) -> bool:
        finite = self.optimizer.perturb()
        if self.scaler is not None and not bool(finite):  # a sum over ranks: the same on all
            return False
        self.publish()
        self._perturbed_elsewhere = True
        return True

    def perturb_ahead(self) -> None:
        """See `Backend.perturb_ahead`: one more all-gather."""
        if self.optimizer.perturb_ahead():
            self.publish()
            self._perturbed_elsewhere = True

    def update(self) -> Seen:
        seen = super().update()
        self.publish()
        return seen

    def skip(self) -> Seen:
        seen = super().skip()
        if self._perturbed_elsewhere:
            self.publish()
        return seen

    def abandon(self) -> None:
        """See `Backend.abandon`. Other ranks' slices are restored only if these ranks answer."""
        self.optimizer.abandon()
        if self._perturbed_elsewhere:
            self.publish()

    # For checkpoints.

    def held(self) -> Sequence[Flat]:
        """The own slice of every row."""
        return self.flats

    def after_load(self) -> None:
        """See `StoredLayers.after_load`."""
        self.publish()
        super().after_load()
