"""Engine: a training step with one gradient or two, on any backend."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import kernels
from .backends.averages import Averages
from .backends.backend import Backend, Loss
from .backends.batches import check_batches, check_loss, check_ranks, split
from .backends.ddp import DDP
from .backends.plain import PRECISION_DTYPES, Plain
from .backends.wrappers import check_joined, check_wrappers, in_ddp, several_ranks
from .errors import ConfigError
from .maths import together
from .maths.together import Groups
from .optim.checks import (
    check_base,
    check_fp32,
    check_inside,
    check_no_fsdp1,
    check_one_device,
)
from .optim.replay import Replay
from .optim.rule import Rule, check_choice, check_number
from .optim.seen import Seen
from .optim.sharpness import Sharpness

ASCENTS = ("global", "rank")


@dataclass(frozen=True)
class Report:
    """What one step did.

    Attributes:
        step: number of this step, counted from 0.
        loss: mean over the global batch at w (MSAM: at w + eps), 0-dim, on the device.
        seen: norms of the step: see `Seen`.
    """

    step: int
    loss: Tensor
    seen: Seen

    @property
    def look(self) -> bool:
        """True if the second gradient was computed."""
        return self.seen.look


class Engine:
    """Trains with one or two gradients a step, on any backend.

    Args:
        model: a module; a module in DistributedDataParallel; a module after `fully_shard`; a
            DeepSpeedEngine that was initialised with one of our optimizers; or a backend. A module
            trains with Horovod after `hvd.init()`, and where the base is a
            `hvd.DistributedOptimizer`.
        optimizer: `SAM`, `LookSAM`, `LookLayerSAM`, or any torch optimizer (never looks). Left out
            with a DeepSpeedEngine or a backend, which have theirs.
        loss: `loss(model, batch)` -> mean loss of one micro-batch, 0-dim. Under DDP it is called
            once more before the first step of a process, for the order of its buckets. On a look
            it is called twice with each batch and draws the same numbers from torch's default
            generators, `random` and NumPy's; not so from a generator of its own.
        clip: maximum norm of the gradient passed to the base optimizer; None for no clipping.
        precision: "fp32", "bf16", or "fp16" with a loss scale. Weights stay fp32. Plain and DDP:
            by autocast, which Engine opens around `loss`. FSDP2: as the policy's param_dtype.
            DeepSpeed: its config decides, and another one than the config's is refused.
        ascent: "global", as m says; "rank", m is the number of samples that each rank has.
        m: number of samples that climb together, each group along its own mean gradient: a part
            of a micro-batch, or whole ones. Groups are consecutive: micro-batch a of rank r is
            number a * ranks + r of the batch. None: the whole batch.
        ema: decay of a moving average of the weights, in (0, 1), for `averaged` and checkpoints;
            None: there is none. See `backends.averages`.

    Attributes:
        passes: forward+backward passes so far, of whole global batches.
        optimizer: `SAM`, `LookSAM` or `LookLayerSAM`; `optimizer.steps` counts the
            steps done.
        backend: `backend.full_weights()`, called on all ranks, is the module's state_dict in fp32
            on rank 0 and None elsewhere; `backend.evaluate(forward)` is forward(module) in the
            arithmetic of training (call `eval()` yourself).

    Raises:
        ConfigError: a setting is out of range, or the module or the optimizer cannot be trained
            correctly: trained parameters outside the module, on several devices, in 16 bits,
            complex, or of FSDP1.

    Parameters of the module that the optimizer does not have, or that get no gradient, are not
    trained and count in no norm.

    A step reads from the device only: after a look, whether it was skipped, where the next step
    would not look anyway; in fp16 the overflow flag, as every loss scaler does; under ZeRO in its
    first step and where a DeepSpeedEngine has a scheduler, or checks bf16 for overflow, that of
    each pass, and with offload it synchronises; and, with a base optimizer that cannot skip on the
    device (fused SGD at its first step, every foreign one), whether to step it.
    """

    def __init__(
        self,
        model: nn.Module | Backend,
        optimizer: Optimizer | None = None,
        loss: Loss | None = None,
        *,
        clip: float | None = None,
        precision: str = "fp32",
        ascent: str = "global",
        m: int | None = None,
        ema: float | None = None,
    ) -> None:
        _check_kinds(model, loss)
        check_choice("precision", precision, tuple(PRECISION_DTYPES))
        check_choice("ascent", ascent, ASCENTS)
        if clip is not None:
            check_number("clip", clip, 1.0)
            if not clip > 0:
                raise ConfigError(f"clip must be > 0, got {clip}. Leave it out for no clipping.")
        if isinstance(model, nn.Module):
            self.backend = _backend(model, optimizer, precision)
        else:
            self.backend = model
        if ema is not None:
            check_number("ema", ema, 0.9998)
            if not 0 < ema < 1:
                raise ConfigError(f"ema must be in (0, 1), got {ema}; usual is 0.9998.")
            self.backend.ema = Averages(ema)
        self.optimizer = self.backend.optimizer
        _check_m(m, ascent, self.optimizer.rule)
        self.m = m
        self.optimizer.clip = clip
        self.module = self.backend.module
        if not self.backend.ranks_may_join:
            kernels.agree(next(self.module.parameters()).device, self.backend.gather)
        assert loss is not None  # by _check_kinds
        self.loss = loss
        self.ascent = ascent
        self.passes = 0
        self._sizes: list[int | None] | None = None  # of this rank's first micro-batches

    def step(self, batches: Sequence[Any]) -> Report:
        """One optimizer step on this rank's micro-batches, all of the same size on all ranks.

        A look uses every batch twice, so they must be a list.

        Raises:
            ConfigError: they are no list, or their sizes (the first dimension of all tensors in a
                batch) differ: within this rank at any step, between ranks at the first. Or `loss`
                returned something else than a 0-dim tensor with a gradient. Or it is called inside
                `averaged`.
        """
        self._check_sizes(batches)
        if self.backend.ema is not None:
            self.backend.ema.check_not_swapped("a step")
        number = self.optimizer.steps
        replay = Replay(self.module)
        try:
            with torch.enable_grad():
                loss, seen, passes = self._passes(batches, replay)
        except BaseException:
            self.backend.abandon()
            replay.undo()
            raise
        self.passes += passes
        self.backend.average_weights(number + 1)
        replay.undo_buffers(unless=seen.finite)
        self.optimizer.mark_stepped()
        return Report(number, self._mean(loss), seen)

    def _mean(self, loss: Tensor) -> Tensor:
        """The mean loss over ranks; with it goes what decides the next looks, if anything."""
        watched = self.optimizer.decider.watched()
        if watched is None:
            return self.backend.mean(loss)
        both = self.backend.mean(torch.stack([loss.double(), watched.to(loss.device).double()]))
        self.optimizer.decider.agree(both[1])
        return both[0].to(loss.dtype)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the module's weights are their moving averages, on every rank: to evaluate, or to
        take them by `backend.full_weights()`. Buffers are those of training. Collective.

        Raises:
            ConfigError: the engine keeps none.
        """
        if self.backend.ema is None:
            raise ConfigError(
                "averaged needs averages of the weights, got an Engine without; make it with "
                "Engine(..., ema=0.9998)."
            )
        return self.backend.averaged()

    def _checked_loss(self, model: nn.Module, batch: Any) -> Tensor:
        value = self.loss(model, batch)
        check_loss(value)
        return value

    def _check_sizes(self, batches: Sequence[Any]) -> None:
        """Sizes of all ranks are compared in the first step, by one gather; never under Horovod,
        where ranks may join later."""
        sizes = check_batches(batches)
        if self._sizes is None and not self.backend.ranks_may_join:
            check_ranks(self.backend.gather(sizes))
        self._sizes = sizes

    def _passes(self, batches: Sequence[Any], replay: Replay) -> tuple[Tensor, Seen, int]:
        """The loss of the first pass, what the step did, and the number of passes.

        The second is left out if the first is known to be not finite: not on a GPU in fp32 and
        bf16, where to know would be to wait; the step is then skipped after both.
        """
        backend, grouped = self.backend, self.m is not None or self.ascent == "rank"
        if self.optimizer.perturbs_ahead():
            backend.perturb_ahead()
        grouped = grouped and self.optimizer.rule.two_passes and self.optimizer.climbs()
        groups = self._groups(len(batches)) if grouped else None
        if groups is not None and self.optimizer.looks():
            return self._look_in_groups(batches, groups), backend.update(), 2
        loss = backend.backward(batches, self._checked_loss)
        if not self.optimizer.looks():
            return loss, backend.update(), 1
        if not backend.perturb():
            return loss, backend.skip(), 1
        with replay.again():
            backend.backward(batches, self._checked_loss)
        return loss, backend.update(), 2

    def _groups(self, accumulation: int) -> Groups | None:
        """The groups of m samples; ConfigError if m does not fit ranks or backend."""
        assert self._sizes is not None
        size, m, why = self._sizes[0], self.m, ""
        if self.ascent == "rank":  # as many samples as a rank has, known or not
            size = size or 1
            m, why = size * accumulation, " by ascent rank"
        if size is None:
            raise ConfigError(
                f"m counts samples, got micro-batches of unknown size and m {m}; give tensors "
                f"whose first dimension is the sample, or leave m out."
            )
        return together.groups(
            m,
            micro_batch=size,
            accumulation=accumulation,
            ranks=self.backend.size,
            climbing=self.backend.climbing_ranks(),
            backend=self.backend.name,
            why=why,
        )

    def _look_in_groups(self, batches: Sequence[Any], groups: Groups) -> Tensor:
        """Both passes of each group of samples in turn. Returns the mean loss of first passes."""
        backend, step = self.backend, groups.micro_batches
        if groups.parts > 1:
            batches = [part for batch in batches for part in split(batch, groups.parts)]
        losses: list[Tensor] = []
        for start in range(0, len(batches), step):
            own, last = batches[start : start + step], start + step == len(batches)
            replay = Replay(self.module)
            average = backend.averages(groups)
            losses.append(backend.backward(own, self._checked_loss, average=average))
            backend.perturb_group(groups)
            onto = backend.take_sum() if last else None
            with replay.again():
                backend.backward(own, self._checked_loss, average=last, onto=onto)
            backend.end_group(groups, last=last)
        return torch.stack(losses).mean()


def _check_m(m: Any, ascent: str, rule: Rule) -> None:
    if m is None:
        rule.check_m("ascent rank" * (ascent == "rank"))
        return
    if isinstance(m, bool) or not isinstance(m, int) or m < 1:
        raise ConfigError(f"m must be a whole number of samples >= 1, got {m!r}.")
    if ascent != "global":
        raise ConfigError(f"m and ascent rank must not both be given, got m {m}; leave one out.")
    rule.check_m(f"m {m}")


def _check_kinds(model: Any, loss: Any) -> None:
    """ConfigError for arguments of Engine that are of another kind, or in another order."""
    if not isinstance(model, nn.Module) and not hasattr(model, "climbing_ranks"):
        raise ConfigError(
            f"model must be a module, a DeepSpeedEngine or a backend, got a "
            f"{type(model).__name__}; call Engine(model, optimizer, loss)."
        )
    if not callable(loss):
        got = "none" if loss is None else f"a {type(loss).__name__}"
        raise ConfigError(f"Engine needs loss, got {got}; pass loss(model, batch) -> mean loss.")


def _with_rule(optimizer: Optimizer) -> Sharpness:
    if isinstance(optimizer, Sharpness):
        return optimizer
    check_base(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return Sharpness(params, optimizer, rule=Rule(ascent=None))


def _backend(model: nn.Module, optimizer: Optimizer | None, precision: str) -> Backend:
    check_wrappers(model)
    if hasattr(model, "zero_optimization_stage"):
        from .backends.zero.library import check_precision
        from .backends.zero.step import Zero

        check_precision(model, precision)
        return Zero(model)
    if optimizer is None:
        raise ConfigError("Engine needs an optimizer with a module, got none.")
    sharpness = _with_rule(optimizer)
    params = [p for group in sharpness.param_groups for p in group["params"]]
    check_no_fsdp1(model.parameters())
    kind: Any = DDP if in_ddp(model) or several_ranks() else Plain
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        if not hasattr(model, "reshard"):
            raise ConfigError(
                "Engine needs fully_shard called on the whole module, got parts of it sharded; "
                "call fully_shard(model) after its parts, then make the optimizer."
            )
        from .backends.fsdp2 import FSDP2 as kind
    else:
        check_inside(params, model)
        sharpness.module = model
        check_fp32(params)
        check_one_device(params)
    if _horovod(optimizer) and kind is Plain:
        from .backends.horovod.whole import Horovod as kind
    if kind is Plain:
        check_joined()
    return kind(model, sharpness, precision=precision)


def _horovod(optimizer: Optimizer) -> bool:
    """True if the caller has initialised Horovod, or wrapped the base in its optimizer."""
    library = sys.modules.get("horovod.torch")
    if library is None:
        return False
    base = getattr(optimizer, "base_optimizer", optimizer)
    return library.is_initialized() or hasattr(base, "skip_synchronize")
