"""One small training problem, for the truth in float64 and for every backend in fp32.

Odd sizes, so that flat partitions split layers and need padding; a layer of zeros, whose norm is 0;
one entry alone; two parameter groups with different decay and learning rate.
"""

import os
from functools import cache
from pathlib import Path

import reference
import torch
from torch import nn
from torch.nn import functional as F

DEVICE = os.environ.get("TASK_DEVICE", "cpu")  # of ranks; the truth is made on the CPU
BATCH = 24  # a multiple of ranks x accumulation for 1, 2, 3 ranks and 1, 2, 4
STEPS = 20
LR, SMALLER_LR = 0.02, 0.005  # of matrices, and of the rest
SETTINGS = {"k": 3, "alpha": 0.4, "eps": 1e-4, "decay": 0.1}
RHO = {"model": 0.05, "layer": 0.02}
# The beginnings of the names of the layers that --perturb means.
PERTURBED = {"all": "", "norms": "norm.", "first|last": ("first.", "last.")}
OPTIMIZERS = tuple(reference.TABLE)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.second = nn.Linear(13, 5)
        self.last = nn.Linear(5, 3, bias=False)
        self.shift = nn.Parameter(torch.zeros(3))
        self.gain = nn.Parameter(torch.full((1, 1), 0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.second(self.norm(self.first(x))))
        return self.last(hidden) * self.gain + self.shift


def net() -> Net:
    torch.manual_seed(0)
    return Net().to(DEVICE)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step, float64 images [24, 7] and labels."""
    draw = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, 7, generator=draw)
    return x, torch.randint(0, 3, (BATCH,), generator=draw)


def part(step: int, rank: int, ranks: int, accumulation: int) -> list[tuple]:
    """This rank's micro-batches."""
    x, y = batch(step)
    n = BATCH // (ranks * accumulation)
    starts = [(a * ranks + rank) * n for a in range(accumulation)]
    return [(x[s : s + n].to(DEVICE), y[s : s + n].to(DEVICE)) for s in starts]


def loss(model: nn.Module, samples: tuple) -> torch.Tensor:
    x, y = samples
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y)


def _gradient(weights: list, samples: tuple) -> tuple[float, list]:
    model = net().double()
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(torch.from_numpy(w))
    x, y = samples
    value = F.cross_entropy(model(x.double()), y)
    value.backward()
    return float(value.detach()), [p.grad.numpy() for p in model.parameters()]


@cache
def truth(
    optimizer: str,
    base: str | None = None,
    *,
    m: int | None = None,
    perturb: str = "all",
    **changed,
) -> reference.Result:
    """What tests/reference.py says; m: samples of a group, None for the whole batch; perturb: of
    PERTURBED."""
    start = list(net().parameters())
    layer = reference.TABLE[optimizer][0] == "layer"
    matrices = [i for i, p in enumerate(start) if p.ndim > 1]
    rest = [i for i, p in enumerate(start) if p.ndim <= 1]
    moved = [n.startswith(PERTURBED[perturb]) for n, _ in net().named_parameters()]
    groups = [
        {"layers": [i for i in layers if moved[i] == may_move], "perturb": may_move, **how}
        for layers, how in (
            (matrices, {"weight_decay": SETTINGS["decay"], "lr": LR}),
            (rest, {"weight_decay": 0.0, "lr": SMALLER_LR}),
        )
        for may_move in (True, False)
    ]
    settings = {"steps": STEPS, "rho": RHO["layer" if layer else "model"], "lr": LR}
    settings |= {"alpha": SETTINGS["alpha"], "k": SETTINGS["k"], "eps": SETTINGS["eps"]}

    def of_part(w: list, t: int, low: int, high: int) -> list:
        x, y = batch(t)
        return _gradient(w, (x[low:high], y[low:high]))[1]

    return reference.train(
        [p.detach().double().numpy() for p in start],
        lambda w, t: _gradient(w, batch(t)),
        optimizer=optimizer,
        base=base,
        groups=groups,
        m=m,
        batch_size=BATCH,
        part_gradient=of_part,
        **{**settings, **changed},
    )


def tolerance(optimizer: str, base: str | None) -> float:
    """The contract's, in max abs after 20 steps: 1e-6 where the base is SGD, 2e-5 elsewhere."""
    return 1e-6 if (base or reference.TABLE[optimizer][3]) == "sgd" else 2e-5


def worst(weights: dict[str, torch.Tensor], result: reference.Result) -> float:
    """Largest difference to the truth in any entry of any layer."""
    names = [n for n, _ in net().named_parameters()]
    wanted = dict(zip(names, result.weights[-1], strict=True))
    return max(
        float((weights[n].cpu().double() - torch.from_numpy(wanted[n])).abs().max()) for n in names
    )


def own_part(weight: torch.Tensor) -> torch.Tensor:
    """This rank's entries of a weight as forward sees them. DeepSpeed's stage 3 pads them with
    whatever stood in memory: after a look, a signalling NaN there has become a quiet one."""
    stage3 = getattr(weight, "ds_tensor", None)
    if stage3 is None:
        whole = weight.detach()
        return whole.to_local() if hasattr(whole, "to_local") else whole
    length = stage3.numel()
    start = torch.distributed.get_rank(weight.ds_process_group) * length
    return stage3.detach()[: max(min(weight.ds_numel - start, length), 0)]


def result_file(folder: Path, number: int) -> Path:
    return folder / f"case-{number}.pt"
