"""One training step: the same micro-batches once or twice, and what the base optimizer gets."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .backends.backend import Backend, Loss
from .backends.batches import check_batches, check_ranks
from .backends.ddp import DDP
from .backends.plain import DTYPES, Plain
from .backends.wrappers import check_wrappers, in_ddp, several_ranks
from .errors import ConfigError
from .optim.checks import check_fp32, check_inside, check_no_fsdp1, check_one_device
from .optim.replay import Replay
from .optim.rule import Rule, check_choice
from .optim.seen import Seen
from .optim.sharpness import Sharpness

ASCENTS = ("global", "rank")


@dataclass(frozen=True)
class Report:
    """What one step did. `loss` is the mean over the global batch at w, 0-dim, on the device."""

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
        clip: limit of the norm of the gradient that the base gets; None for none.
        precision: "fp32", "bf16", or "fp16" with a loss scale. Weights stay fp32.
        ascent: "global", eps from the averaged gradient; "rank", from each rank's own.

    Attributes:
        passes: forward+backward passes so far, of whole global batches.

    Raises:
        ConfigError: a setting is out of range, or the module or the optimizer cannot be trained
            rightly: trained parameters outside the module, on several devices, in 16 bits, complex,
            or of FSDP1.

    Parameters of the module that the optimizer does not have, or that get no gradient, are not
    trained, and count in no norm.

    A step reads nothing from the device, except: after a look, whether it was skipped, where the
    next step would not look anyway; in fp16 the overflow flag, as every loss scaler does; under
    ZeRO the overflow flag of each pass, and all of it with offload, which synchronises; and with a
    base optimizer that cannot skip on the device (fused SGD at its first step, every foreign one),
    whether to call it.
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
    ) -> None:
        check_choice("precision", precision, tuple(DTYPES))
        check_choice("ascent", ascent, ASCENTS)
        if clip is not None and not clip > 0:
            raise ConfigError(f"clip must be > 0, got {clip}. Leave it out for no clipping.")
        if loss is None:
            raise ConfigError("Engine needs loss, got none; pass loss(model, batch) -> mean loss.")
        if isinstance(model, nn.Module):
            self.backend = _backend(model, optimizer, precision)
        else:
            self.backend = model
        if ascent == "rank" and not self.backend.whole_gradients:
            raise ConfigError(
                f"ascent rank needs whole gradients on every rank, got backend "
                f'{self.backend.name}; use ascent="global".'
            )
        self.optimizer = self.backend.optimizer
        self.optimizer.clip = clip
        self.module = self.backend.module
        self.loss = loss
        self.ascent = ascent
        self.passes = 0
        self._sizes: list[int | None] | None = None  # of this rank's first micro-batches

    def step(self, batches: Sequence[Any]) -> Report:
        """One optimizer step on this rank's micro-batches, all of the same size on all ranks.

        On a look the batches are gone through twice, so they must be a list.

        Raises:
            ConfigError: they are no list, or sizes that can be seen (the first dimension of all
                tensors in a batch) differ: between this rank's at every step, between ranks' at
                the first.
        """
        self._check_sizes(batches)
        number = self.optimizer.steps
        replay = Replay(self.module)
        try:
            loss, seen, passes = self._passes(batches, replay)
        except BaseException:
            self.backend.abandon()
            replay.undo()
            raise
        self.passes += passes
        replay.undo_buffers(unless=seen.finite)
        self.optimizer.mark_stepped()
        return Report(number, self.backend.mean(loss), seen)

    def _check_sizes(self, batches: Sequence[Any]) -> None:
        """ConfigError for micro-batches of unequal size: of this rank, and in the first step of all
        ranks, which takes one gather. Not under Horovod, where ranks may join later."""
        sizes = check_batches(batches)
        if self._sizes is None and not self.backend.ranks_may_join:
            check_ranks(self.backend.gather(sizes))
        self._sizes = sizes

    def _passes(self, batches: Sequence[Any], replay: Replay) -> tuple[Tensor, Seen, int]:
        """One pass or two: the loss of the first, what the step did, and how many passes it took.

        The second is left out if the first is known to be not finite: not on a GPU in fp32 and
        bf16, where to know would be to wait; the step is then skipped after both.
        """
        backend, local = self.backend, self.ascent == "rank" and self.optimizer.may_look()
        loss = backend.backward(batches, self.loss, average=not local)
        if not self.optimizer.looks():
            return loss, backend.update(), 1
        if not backend.perturb(local=local):
            return loss, backend.skip(), 1
        with replay.again():
            backend.backward(batches, self.loss)
        return loss, backend.update(), 2


def _with_rule(optimizer: Optimizer) -> Sharpness:
    if isinstance(optimizer, Sharpness):
        return optimizer
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return Sharpness(params, optimizer, rule=Rule(ascent=None))


def _backend(model: nn.Module, optimizer: Optimizer | None, precision: str) -> Backend:
    check_wrappers(model)
    if hasattr(model, "zero_optimization_stage"):
        from .backends.zero.step import Zero

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
    return kind(model, sharpness, precision=precision)


def _horovod(optimizer: Optimizer) -> bool:
    """True if the caller has begun Horovod, or has wrapped the base in its optimizer."""
    library = sys.modules.get("horovod.torch")
    if library is None:
        return False
    base = getattr(optimizer, "base_optimizer", optimizer)
    return library.is_initialized() or hasattr(base, "skip_synchronize")
