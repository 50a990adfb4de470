"""DeepSpeed ZeRO: perturbing the weights is one more kind of optimizer step.

DeepSpeed calls the client optimizer's `step()` with its flat fp32 masters and their reduced,
unscaled gradients, and then copies the masters to the weights that forward uses. So the client
perturbs in one such step and restores in the next; nothing of DeepSpeed is copied, and
restoring needs no gather: the one after the base's step brings the next step's weights.

In fp32 and bf16 the host does not ask a GPU whether a step's gradients are finite. If they are
not, the client writes nothing, and DeepSpeed, which then takes an ordinary step, publishes the
weights as they were. DeepSpeed must not ask either, nor compute a norm that is known: for the time
of a step two of its functions are replaced, see `Layout.known`. Its `get_global_grad_norm` is then
||g||, and its `skipped_steps` counts such a step when the next one is under way.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...maths.shards import clones
from ...optim.base import skips_on_device
from ...optim.entrywise import check_entrywise
from ...optim.later import Later
from ...optim.seen import Seen
from ...optim.sharpness import Sharpness
from ..backend import Loss
from ..stored import watch_first_step
from .groups import ZeroGroups
from .layout import Layout
from .library import check_engine


class Zero(ZeroGroups):
    """A DeepSpeedEngine whose client optimizer is one of ours.

    Args:
        engine: from deepspeed.initialize(model=..., optimizer=<SAM, LookSAM, ...>, config=...).
        autocast: dtype of arithmetic where the engine's weights are fp32; None for none.

    Raises:
        ConfigError: the engine's optimizer is not ours, its base needs whole layers where the
            stage cuts them, or its configuration is one that would give wrong gradients without an
            error.
    """

    name = "zero"

    def __init__(self, engine: Any, *, autocast: torch.dtype | None = None) -> None:
        check_engine(engine)
        self.engine = engine
        self.model = engine
        self.module: nn.Module = engine.module
        self.optimizer: Sharpness = engine.basic_optimizer
        self.stage = int(engine.zero_optimization_stage())
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.replicas = (1, 0) if self.stage else (self.size, self.rank)
        self.layout = Layout(engine, self.optimizer, self.stage)
        self.whole_gradients = self.layout.whole_gradients
        self.device = torch.device(engine.device)
        self.autocast = autocast
        dtype = next(self.module.parameters()).dtype
        flat_of = {f.master: f for f in self.layout.flats}
        self.masters = list(flat_of)
        if self.stage:  # the groups of stage 3 are empty between steps
            check_entrywise(self.optimizer.base_optimizer, self.masters[0].device)
        self.optimizer.bind(
            pieces=lambda param, like: flat_of[param].views(like),
            reduce=self.reduce,
            visible_dtype=autocast or (None if dtype == torch.float32 else dtype),
            driver=self._client_step,
            group_of={master: flat.group for master, flat in flat_of.items()},
            device=self.device,
        )
        watch_first_step(self)
        self._offloaded = self.device.type == "cuda" and any(not m.is_cuda for m in self.masters)
        self._work: Callable[[list[Tensor]], None] | None = None
        self._unscale = 1.0
        self._failed, self._means = False, []
        self._began = False  # a step was taken: the base has its states
        self._finite: Later | None = None  # of the last step, if the host has not asked yet

    # Passes.

    def evaluate(self, forward: Callable[[nn.Module], Tensor]) -> Tensor:
        with torch.no_grad(), self._arithmetic():
            return forward(self.module)

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def backward(
        self,
        batches: Sequence[Any],
        loss: Loss,
        *,
        average: bool = True,
        onto: dict[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if onto is not None and self.whole_gradients:
            average = False  # `end_group` averages, once the sum is complete
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            reduced = average or not self.whole_gradients
            self.engine.set_gradient_accumulation_boundary(last and reduced)
            with self._arithmetic():
                value = loss(self.model, batch)
            self.engine.backward(value / len(batches), scale_wrt_gas=False)
            total += value.detach().float()
        return total / len(batches)

    def _wait_for_host(self) -> None:
        """With offload: wait for DeepSpeed's copies to and from the host."""
        if self._offloaded:
            torch.cuda.synchronize(self.device)

    def _unscaled(self) -> list[Tensor]:
        """Shards of the mean gradient in fp32, for sums."""
        self._wait_for_host()
        scale = self.layout.scale()
        grads = [g.float() for g in self.layout.gradients()]
        return grads if scale == 1.0 else [g / scale for g in grads]

    # The client optimizer, called by DeepSpeed once per group, sub-group or step.

    def _client_step(self) -> None:
        if self._work is None:
            return  # a step that must change nothing
        groups = self.optimizer.param_groups
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        scale = self.layout.scale()
        if scale != self._unscale:  # DeepSpeed has changed it since backward, then unscaled by it
            torch._foreach_mul_([p.grad for p in params], scale / self._unscale)
        self._work(params)

    def _run(
        self, step: Callable[[], Any], work: Callable[[list[Tensor]], None], sq_norm: Tensor
    ) -> None:
        """Call `step` of DeepSpeed, within which the client calls `work` on its parameters.

        sq_norm: of the gradient, 0-dim, for DeepSpeed, where the host does not know it.
        """
        self._work, self._unscale = work, self.layout.scale()
        try:
            with nullcontext() if self._waits() else self.layout.known(sq_norm):
                step()
        finally:
            self._work = None

    def _waits(self) -> bool:
        """Whether the host asks if the gradients of a pass are finite before it goes on: in fp16,
        with offload, in the first step, with a base that cannot skip on the device; and where
        DeepSpeed steps a scheduler, or looks by itself."""
        skips = self._began and skips_on_device(self.optimizer.base_optimizer)
        return not skips or self._offloaded or self.layout.waits

    @torch.no_grad()
    def perturb(self) -> bool:
        """See `Backend.perturb`: one all-gather at stages 1 and 2, as after any step."""
        perturbation = self.optimizer.perturbation(self.masters, self._unscaled())
        if self._stops(perturbation.finite):
            return False

        def work(params: list[Tensor]) -> None:
            grads: list[Any] = [p.grad for p in params]
            self.optimizer.perturb_(params, clones(grads), perturbation)

        with self.layout.fixed_scale():
            sq_norm = perturbation.grad_sq_norms.sum()
            self._run(self.engine.optimizer.step, work, sq_norm)  # not DeepSpeed's engine's step
        self.engine.optimizer.zero_grad()
        return True

    @torch.no_grad()
    def perturb_ahead(self) -> None:
        """See `Backend.perturb_ahead`: one more all-gather at stages 1 and 2."""
        self._wait_for_host()
        if self.optimizer.perturb_ahead(self.masters):
            self.layout.publish()

    @torch.no_grad()
    def update(self) -> Seen:
        """See `Backend.update`: the step of DeepSpeed's engine."""
        update = self.optimizer.decide(self.masters, self._unscaled())
        self._count_skipped()
        waits = self._waits()
        if waits and not bool(update.finite):
            return self._skip(look=self.optimizer.looking)
        if waits:
            update = replace(update, finite=torch.tensor(True))  # on the host: no further read
        if not self.optimizer.looking:
            self.optimizer.restore()  # also what gets no gradient in this step
        self._means = []
        apply_ = partial(self.optimizer.apply_, update=update)
        self._run(self.engine.step, apply_, update.grad_sq_norm)
        self._began = True
        if not waits:
            self._finite = Later(update.finite)
            self.layout.report(self._finite)
        return self.optimizer.finish(update)

    def _count_skipped(self) -> None:
        """Count the last step in DeepSpeed's `skipped_steps` if it was skipped unknown to it."""
        finite, self._finite = self._finite, None
        if finite is not None and not finite:
            self.engine.skipped_steps += 1

    @torch.no_grad()
    def skip(self) -> Seen:
        return self._skip(look=True)

    def _skip(self, *, look: bool) -> Seen:
        """DeepSpeed counts the step and in fp16 lowers the loss scale; nothing else changes."""
        self._count_skipped()
        perturbed, skipped = self.optimizer.perturbed, self.engine.skipped_steps
        self.optimizer.restore()
        self._spoil_means()
        self.engine.step()  # with no work for the client
        self.engine.skipped_steps = skipped + 1  # also where DeepSpeed does not look
        self.layout.report(False)
        self.engine.optimizer.zero_grad()
        if perturbed:
            self.layout.publish()
        return self.optimizer.skip(look=look)

    @torch.no_grad()
    def abandon(self) -> None:
        self._wait_for_host()
        perturbed = self.optimizer.perturbed
        self._failed, self._means = False, []
        self.optimizer.abandon()
        self.layout.reset_pass()
        if perturbed:
            self.layout.publish()
