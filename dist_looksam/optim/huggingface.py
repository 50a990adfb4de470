"""The second pass of a look under the Trainer of Hugging Face's transformers.

    class LookSAMTrainer(TrainerMixin, Trainer): ...

The Trainer has no closure to call twice: it adds up the gradients of a step's micro-batches by
`training_step` and then calls `optimizer.step()`. The mixin keeps the micro-batches, and a look
within `optimizer.step()` calls `training_step` of the Trainer with each of them again.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..errors import ConfigError
from .checks import check_fp32
from .replay import Replay
from .sharpness import Sharpness

_SIMPLE = ("NO", "MULTI_CPU", "MULTI_GPU")  # of accelerate's DistributedType: one process, and DDP


class TrainerMixin:
    """Before `transformers.Trainer` in the bases of a class, with one of our optimizers.

    Accumulation, bf16 autocast, activation checkpointing, DDP and resuming are the Trainer's.
    Both passes of a look see the same micro-batches and draw the same random numbers; buffers are
    left as one pass would leave them. `max_grad_norm` clips once what the base optimizer gets: the
    mixin makes it `optimizer.clip`. The logged grad_norm is that of g, not clipped.

    Raises:
        ConfigError: at `train` or its first step: DeepSpeed, FSDP or DataParallel by the Trainer, a
            loss scale (fp16), weights in 16 bits, another optimizer, or a Trainer that clips in a
            way that cannot be left out.
    """

    accelerator: Any
    args: Any
    optimizer: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of the Trainer, after checks."""
        self._check_trainer()
        self._micro_batches: list[tuple[Any, Any]] = []
        self._replay: Replay | None = None
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """As of the Trainer: forward and backward of one micro-batch, which is kept for a look."""
        optimizer = self._sharpness()
        if not self._micro_batches:
            self._begin(optimizer, model)
        kept = copy.copy(inputs), num_items_in_batch
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        except BaseException:
            self._abandon(optimizer)
            raise
        self._micro_batches.append(kept)
        return loss

    def _begin(self, optimizer: Sharpness, model: Any) -> None:
        clip = self.args.max_grad_norm or None
        if optimizer.clip not in (None, clip):
            raise ConfigError(
                f"max_grad_norm must be optimizer.clip where both are given, got {clip} and "
                f"{optimizer.clip}; leave out optimizer.clip."
            )
        check_fp32(p for group in optimizer.param_groups for p in group["params"])
        autocast = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None
        optimizer.bind(visible_dtype=autocast, driver=self._finish_step)
        optimizer.clip = clip
        self._model, self._replay = model, Replay(model)
        if optimizer.perturbs_ahead():
            optimizer.perturb_ahead()

    def _finish_step(self) -> None:
        """In place of `optimizer.step`, after the first pass."""
        optimizer, replay = self._sharpness(), self._replay
        if not self._micro_batches or replay is None:
            raise ConfigError(
                "training_step must call that of TrainerMixin for every micro-batch, got a step "
                "without; call super().training_step in yours."
            )
        try:
            if optimizer.looks():
                optimizer.perturb()
                optimizer.zero_grad()
                with replay.again():
                    self._second_pass()
            seen = optimizer.update()
        except BaseException:
            self._abandon(optimizer)
            raise
        replay.undo_buffers(unless=seen.finite)
        self._micro_batches, self._replay = [], None

    def _second_pass(self) -> None:
        last = len(self._micro_batches) - 1
        for n, (inputs, num_items) in enumerate(self._micro_batches):
            alone: AbstractContextManager[Any] = nullcontext()
            if n < last:
                alone = self.accelerator.no_sync(model=self._model)
            with alone:
                super().training_step(self._model, inputs, num_items)  # type: ignore[misc]

    def _abandon(self, optimizer: Sharpness) -> None:
        """After an exception: weights, random states and buffers as before the step."""
        optimizer.abandon()
        if self._replay is not None:
            self._replay.undo()
        self._micro_batches, self._replay = [], None

    def _clip_grad_norm(self, model: Any) -> Any:
        """The Trainer calls this to clip g, of which a look needs the true norm; see `clip`."""
        return self._get_grad_norm(model)  # type: ignore[attr-defined]

    def _sharpness(self) -> Sharpness:
        optimizer = self.optimizer
        while not isinstance(optimizer, Sharpness) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # accelerate's wrapper
        if not isinstance(optimizer, Sharpness):
            raise ConfigError(
                f"TrainerMixin needs SAM, LookSAM or LookLayerSAM, got {type(optimizer).__name__}; "
                f"pass optimizers=(LookSAM(...), None)."
            )
        return optimizer

    def _check_trainer(self) -> None:
        if self.optimizer is not None:  # else `create_optimizer` makes it
            self._sharpness()
        state = self.accelerator
        kind = str(getattr(state.distributed_type, "value", state.distributed_type))
        found = {
            "DeepSpeed": getattr(self, "is_deepspeed_enabled", False),
            "FSDP": getattr(self, "is_fsdp_enabled", False),
            f"distributed_type {kind}": kind not in _SIMPLE,
            "a parallelism_config": getattr(state, "parallelism_config", None) is not None,
            "a loss scale (fp16=True)": getattr(state, "scaler", None) is not None,
            "DataParallel; start one process for each GPU with torchrun": self.args.n_gpu > 1,
            "a Trainer older than transformers 5": not hasattr(super(), "_clip_grad_norm")
            or not hasattr(super(), "_get_grad_norm"),
        }
        for what, there in found.items():
            if there:
                raise ConfigError(
                    f"TrainerMixin trains one process or DDP, in fp32 or bf16, got {what}; "
                    f"Engine trains the others in a loop of your own (examples/gpt.py)."
                )
