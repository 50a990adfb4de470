"""Looks with several groups of samples under ZeRO: each group is perturbed, and restored, in turn.

At stages 0 and 1 every rank has its own gradient whole, and any groups that micro-batches make up
can climb, if forward's weights are fp32. At stages 2 and 3, and with offload, DeepSpeed reduces
gradients in every backward, so that all ranks share a group; its perturbation is one more step of
DeepSpeed's, which it does not count. The sums of g and g_s are shards there. After the last group
DeepSpeed gets the mean g_s as the gradients of its ordinary step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...maths.together import Groups
from ..whole_groups import WholeGroups
from .state import ZeroState


class ZeroGroups(ZeroState, WholeGroups):
    """The part of `Zero` for `Engine(m=...)`."""

    whole_gradients: bool
    masters: list[Tensor]
    stage: int
    _failed: bool  # a first pass was not finite
    _means: list[Tensor]  # the gradients that DeepSpeed steps with, of groups

    def _unscaled(self) -> list[Tensor]:
        raise NotImplementedError

    def _run(
        self, step: Callable[[], Any], work: Callable[[list[Tensor]], None], sq_norm: Tensor
    ) -> None:
        raise NotImplementedError

    def _waits(self) -> bool:
        raise NotImplementedError

    def _stops(self, finite: Tensor) -> bool:
        """After a first pass: whether the step ends here, as its gradient is not finite. Not where
        to know it would be to wait for a GPU: the step is then skipped after both passes."""
        return (self._waits() or not finite.is_cuda) and not bool(finite)

    def climbing_ranks(self) -> list[int]:
        """See `Backend.climbing_ranks`. None at stage 1 in 16 bits: eps would be added to weights
        in 16 bits there, which round most of it away."""
        if not self.whole_gradients:
            return [self.size]
        if self.stage == 1 and self.optimizer.visible_dtype is not None:
            return []
        return [n for n in range(1, self.size + 1) if self.size % n == 0]

    def averages(self, groups: Groups) -> bool:
        """See `Backend.averages`. With whole gradients DeepSpeed would leave the own shard."""
        return not self.whole_gradients

    def take_sum(self) -> dict[Tensor, Tensor]:
        """See `Backend.take_sum`: `end_group` adds the last group's to it."""
        return {}

    def perturb_group(self, groups: Groups) -> None:
        """See `Backend.perturb_group`; at stages 2 and 3 it reads the overflow flag from a GPU
        where `_waits` says so. At stage 2 one all-gather, as after any step."""
        if self.whole_gradients:
            self.perturb_whole(groups)
        else:
            self._perturb_shards()

    def end_group(self, groups: Groups, *, last: bool) -> None:
        """See `Backend.end_group`. At stage 2 one all-gather, unless after the last group."""
        if self.whole_gradients:
            means = self.end_whole(groups, last=last)
        else:
            means = self._end_shards(groups.rounds, last=last)
        if last:
            self._means = means
            self.layout.reset_pass()
            self.layout.set_gradients(means)

    def _spoil_means(self) -> None:
        """Before DeepSpeed's step of a skipped look: let it see an overflow. It has the means of
        g_s alone, which may be finite where g is not."""
        for mean in self._means:
            mean.fill_(torch.inf)
        if self._means and self.layout.offloads:  # no step, which would see none; nor a count of it
            self.engine.set_gradient_accumulation_boundary(False)
            self.layout.overflowed()
        self._means = []

    # Stages 0 and 1.

    def own_layers(self) -> tuple[list[Tensor], list[Tensor]]:
        """See `WholeGroups.own_layers`."""
        return self.layout.visible()

    def clear_own(self) -> None:
        """See `WholeGroups.clear_own`."""
        self.engine.optimizer.zero_grad()

    # Stages 2 and 3.

    @torch.no_grad()
    def _perturb_shards(self) -> None:
        perturbation = self.optimizer.perturbation(self.masters, self._unscaled())
        if self._stops(perturbation.finite):
            self._failed = True  # no eps, and at the end the step is skipped
            self.optimizer.keep([], [])
            self.layout.reset_pass()
            return

        def work(params: list[Tensor]) -> None:
            grads: list[Any] = [p.grad for p in params]
            self.optimizer.perturb_group_(params, grads, perturbation)

        with self.layout.fixed_scale():
            self._run(self.engine.optimizer.step, work, perturbation.grad_sq_norms.sum())
        self.engine.optimizer.zero_grad()

    @torch.no_grad()
    def _end_shards(self, rounds: int, *, last: bool) -> list[Tensor]:
        shards, grads = iter(self._unscaled()), []
        for flat in self.layout.flats:
            grads.append(torch.zeros_like(flat.master))
            for view in flat.views(grads[-1]):
                view.copy_(next(shards))
        means = self.optimizer.close_group(self.masters, grads, last=last)
        if not last:
            self.layout.reset_pass()
            self.layout.publish()
            return []
        if self._failed:
            self._failed = False
            self.optimizer.set_group_means(self.masters, grads)
            for mean in means:
                mean.fill_(torch.inf)
            return means
        for sums in (means, self.optimizer.sum_of_g(self.masters)):
            torch._foreach_mul_(sums, 1 / rounds)
        return means
