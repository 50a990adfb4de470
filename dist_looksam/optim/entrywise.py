"""Whether a base optimizer works on each weight by itself, as it must on shards of layers.

Flats of ZeRO and rows of FSDP2 show a base some weights of a layer, or several layers in a row. Of
these Adafactor, Muon and Shampoo compute other numbers than of layers, without an error.
"""

import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from ..errors import ConfigError

KNOWN = {
    optim.ASGD, optim.Adadelta, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW, optim.NAdam,
    optim.RAdam, optim.RMSprop, optim.Rprop, optim.SGD,
}  # fmt: skip
# A small layer first, since Shampoo of a flat of thousands takes minutes; then one of which no side
# is below 128, since some bases treat others entry by entry.
SHAPES = ((4, 3), (130, 129))
STEPS = 30  # some bases begin after 25 steps
DO = "use SGD, AdamW, Lamb or Lars, or a backend that keeps layers whole (ddp, horovod, ZeRO 0)"


def check_entrywise(base: Optimizer, device: torch.device) -> None:
    """ConfigError for a base that updates half a layer otherwise than the layer.

    torch's own are known by class, and a base with `pieces`, such as `Lamb`, is shown the layers in
    its shards. Any other is tried on a layer of each of SHAPES with the settings of every group:
    whole, and in two flat halves that two instances have, as on two ranks; on `device`.
    """
    if type(base) in KNOWN or hasattr(base, "pieces"):
        return
    name = type(base).__name__
    for shape, group in product(SHAPES, base.param_groups):
        try:
            alike = all(_alike(step) for step in _steps(base, group, shape, device))
        except Exception as error:
            raise ConfigError(
                f"a base optimizer on shards must update each weight by itself, which cannot be "
                f"checked of {name}, since one over a small layer raises {type(error).__name__} "
                f"({str(error).split(chr(10))[0]}); {DO}."
            ) from error
        if not alike:
            raise ConfigError(
                f"a base optimizer on shards must update each weight by itself, got {name}, which "
                f"updates half a layer otherwise than the whole layer; {DO}."
            )


def _alike(movements: tuple[Tensor, Tensor]) -> bool:
    """Whether they are the same up to rounding, and up to few signs that rounding decides."""
    whole, halves = movements
    return bool((whole - halves).abs().mean() <= 1e-3 * whole.abs().mean())


def _steps(
    base: Optimizer, group: dict[str, Any], shape: tuple[int, int], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """After each step, how far a layer has moved: [all its weights], whole and in halves."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.linspace(0.1, 1, shape[0])[:, None], torch.linspace(0.2, 1, shape[1])

    def draw() -> Tensor:
        return rows * columns * torch.randn(shape, generator=generator)

    start, slope = draw().to(device), draw()
    parts = [start.clone(), *(half.clone() for half in start.view(-1).chunk(2))]
    params = [nn.Parameter(part) for part in parts]
    with torch.random.fork_rng(devices=[]):
        trials = [_another(base, group, p) for p in params]
        for t in range(STEPS):
            # One direction, for bases that find their learning rate; rows that grow unequally, for
            # bases that clip what grows; orthogonal to the first weights, for bases of norms.
            grad = ((1 + t * rows) * (slope + 0.3 * draw())).to(device)
            grad -= (
                start * (grad * start).sum(1, keepdim=True) / start.square().sum(1, keepdim=True)
            )
            for p, g in zip(params, (grad, *grad.view(-1).chunk(2)), strict=True):
                p.grad = g.clone()
            for trial in trials:
                trial.step()
            moved = [p.detach().view(-1) for p in params]
            yield moved[0] - start.view(-1), torch.cat(moved[1:]) - start.view(-1)


def _another(base: Optimizer, group: dict[str, Any], param: nn.Parameter) -> Any:
    """A base of the same class and settings over one parameter; with a learning rate > 0, which a
    warm-up's first is not."""
    known = {k: v for k, v in vars(base).items() if isinstance(v, bool | int | float | str)}
    known |= base.defaults
    taken = inspect.signature(type(base)).parameters
    settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    settings |= {"lr": 0.01} if "lr" in settings else {}
    how = {k: v for k, v in known.items() if k in taken and k != "params"}
    kind: Any = type(base)
    return kind([{**settings, "params": [param]}], **how)
