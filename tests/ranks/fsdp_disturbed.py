"""What a caller may do around the Engine under FSDP2 that must not change what is trained."""

from collections.abc import Callable

import task
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_looksam import Engine

# name -> what is done to the module before the Engine is made
BEFORE: dict[str, Callable[[nn.Module], object]] = {
    "backward before": lambda model: task.loss(model, task.part(50, 0, 1, 1)[0]).backward(),
    "kept gathered": lambda model: model.set_reshard_after_backward(False),
}
# name -> what is done with the engine between two steps
BETWEEN: dict[str, Callable[[Engine], object]] = {
    "backward": lambda engine: task.loss(engine.module, task.part(50, 0, 1, 1)[0]).backward(),
    "moved": lambda engine: engine.module._apply(lambda t: t.clone()),
    "assigned": lambda engine: engine.module.load_state_dict(
        {k: v.clone() for k, v in engine.module.state_dict().items()}, assign=True
    ),
    "evaluation raises": lambda engine: evaluation_raises(engine),
}
DISTURBED = (*BEFORE, *BETWEEN)


class Stop(Exception):
    pass


def raises_after(part: nn.Module, *, backward: bool) -> torch.utils.hooks.RemovableHandle:
    """Makes the next forward of `part` raise, or the backward that comes back to it."""

    def stop(_: object) -> None:
        raise Stop

    def hook(module: nn.Module, given: object, out: torch.Tensor) -> None:
        out.register_hook(stop) if backward else stop(out)

    return part.register_forward_hook(hook)


def evaluation_raises(engine: Engine) -> None:
    """And nothing is left gathered."""
    hook = raises_after(engine.module.norm, backward=False)
    try:
        engine.backend.evaluate(lambda model: model(task.batch(100)[0]))
    except Stop:
        pass
    else:
        raise AssertionError("the evaluation did not raise")
    finally:
        hook.remove()
    assert all(isinstance(p, DTensor) for p in engine.module.parameters())
