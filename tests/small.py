"""A small classifier whose loss is a mean over samples, so that it splits over micro-batches and
ranks; and what `reference.train` needs to say what must come out."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dist_looksam import Engine
from dist_looksam.optim import table
from dist_looksam.optim.bases import BASES

INPUTS, HIDDEN, CLASSES, SAMPLES = 6, 9, 4, 12
Pair = tuple[Tensor, Tensor]
LR = {name: row.lr for name, row in BASES.items()}
LR |= {"sgd": 0.1, "adamw": 0.01, "lamb": 0.02, "lars": 0.02}
RHO = {"model": 0.05, "layer": 0.02}
WEIGHT_DECAY, ADAM_EPS = 0.1, 1e-4


def net(*middle: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two linear layers with tanh and `middle` between; the same weights every time."""
    torch.manual_seed(0)
    ends = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, CLASSES)
    return nn.Sequential(ends[0], *middle, nn.Tanh(), ends[1]).to(dtype)


def batch(t: int, dtype: torch.dtype = torch.float64) -> Pair:
    """Step t's global batch."""
    draws = torch.Generator().manual_seed(1000 + t)
    x = torch.randn(SAMPLES, INPUTS, generator=draws, dtype=torch.float64)
    return x.to(dtype), torch.randint(CLASSES, (SAMPLES,), generator=draws)


def micro_batches(
    t: int, *, accumulation: int = 1, rank: int = 0, ranks: int = 1, dtype=torch.float64
) -> list[Pair]:
    """Step t's micro-batches of one rank; over all ranks they are the global batch."""
    x, y = batch(t, dtype)
    size = SAMPLES // (accumulation * ranks)
    starts = [(a * ranks + rank) * size for a in range(accumulation)]
    return [(x[s : s + size], y[s : s + size]) for s in starts]


def loss(model: nn.Module, pair: Pair) -> Tensor:
    return F.cross_entropy(model(pair[0]), pair[1])


def optimizer(model: nn.Module, name: str, base: str | None = None, *, k: int = 3, **how):
    """A row of the table over `model`, as train.py builds it."""
    base = table.base_of(name, base)
    groups = table.groups(model, WEIGHT_DECAY)
    inner = table.build_base(base, groups, lr=LR[base], eps=ADAM_EPS, fused=False)
    rule = table.rule_of(name, k=k, **how)
    return table.build(inner, rule=rule, rho=RHO.get(rule.ascent or "", 0.0), alpha=0.7)


def engine(model: nn.Module, name: str, base: str | None = None, *, loss=loss, **how) -> Engine:
    rest = {x: how.pop(x) for x in ("clip", "precision", "ascent", "m") if x in how}
    return Engine(model, optimizer(model, name, base, **how), loss, **rest)


def weights(model: nn.Module) -> list[np.ndarray]:
    return [p.detach().double().numpy().copy() for p in model.parameters()]


def _gradient(arrays, pair: Pair):
    model = net()
    names = [n for n, _ in model.named_parameters()]
    params = [torch.tensor(a, requires_grad=True) for a in arrays]
    out = functional_call(model, dict(zip(names, params, strict=True)), (pair[0],))
    value = F.cross_entropy(out, pair[1])
    grads = torch.autograd.grad(value, params)
    return float(value.detach()), [g.numpy() for g in grads]


def truth(name: str, base: str | None = None, *, steps: int, k: int = 3, **how):
    """`reference.train` of `net()`."""
    import reference

    base = table.base_of(name, base)
    model = net()
    shapes = [p.ndim for p in model.parameters()]
    groups = [
        {"layers": [i for i, d in enumerate(shapes) if d > 1], "weight_decay": WEIGHT_DECAY},
        {"layers": [i for i, d in enumerate(shapes) if d <= 1], "weight_decay": 0.0},
    ]

    def of_part(arrays, t, low, high):
        x, y = batch(t)
        return _gradient(arrays, (x[low:high], y[low:high]))[1]

    return reference.train(
        weights(model), lambda arrays, t: _gradient(arrays, batch(t)),
        optimizer=name, base=base, steps=steps, lr=LR[base], groups=groups, eps=ADAM_EPS, k=k,
        rho=RHO.get(table.METHODS[name].ascent or "", 0.0),
        batch_size=SAMPLES, part_gradient=of_part, **how,
    )  # fmt: skip
