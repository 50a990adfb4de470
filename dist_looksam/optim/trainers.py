"""Refuses closures of trainers whose gradients are not those of the batch in both passes."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError


def check_trainer(closure: Callable[[], Any]) -> None:
    """ConfigError under a trainer whose gradients would not be those of `closure`."""
    _check_accelerate()
    _check_lightning(closure)


def without_closure() -> str:
    """The end of the sentence about a step without closure; more in a process with a Trainer."""
    if "transformers.trainer" not in sys.modules:
        return ""
    return "; under transformers' Trainer use class MyTrainer(TrainerMixin, Trainer)"


def _check_accelerate() -> None:
    """ConfigError in a process whose Accelerator accumulates gradients.

    Within accumulate() its optimizer calls step, and with it the closure, for the last micro-batch
    alone: the others would be lost without a word (accelerate 1.15, optimizer.py).
    """
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    number = state().num_steps if state is not None and state._shared_state else 1
    if number > 1:
        raise ConfigError(
            f"an Accelerator must not accumulate where the optimizer gets a closure, which is "
            f"called for the last micro-batch alone, got gradient_accumulation_steps {number}; use "
            f"1, or give all micro-batches to dist_looksam.Engine."
        )


def _check_lightning(closure: Callable[[], Any]) -> None:
    """ConfigError for a closure of Lightning's Trainer that clips the gradients of each pass.

    Its closure is partial(Precision._wrap_closure, module, ...), which calls the module's
    configure_gradient_clipping after backward (lightning 2.6, plugins/precision/precision.py). The
    norm of g would be lost, and g_v = g_s - (g_s.g/||g||^2) g be wrong.
    """
    call: Any = closure
    if not isinstance(call, functools.partial) or not call.args:
        return
    if getattr(call.func, "__name__", "") != "_wrap_closure":
        return
    module = call.args[0]
    clips = type(module).configure_gradient_clipping
    library = clips.__module__.partition(".")[0]
    own = library not in ("lightning", "pytorch_lightning")
    value = module.trainer.gradient_clip_val
    if own or value:
        got = "a configure_gradient_clipping of its own" if own else f"gradient_clip_val={value}"
        raise ConfigError(
            f"the Trainer must not clip, since it would clip each pass of a look, got {got}; leave "
            "it out and set optimizer.clip, which clips once what the base optimizer gets."
        )
