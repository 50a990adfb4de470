"""Networks with something awkward in them, trained under FSDP2 and under a backend known to be
right: plain on the whole batch, or DDP where statistics depend on a rank's own images."""

import task
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from dist_looksam.backends.ddp import DDP
from dist_looksam.backends.fsdp2 import FSDP2
from dist_looksam.backends.fsdp2_units import shard
from dist_looksam.backends.plain import Plain
from dist_looksam.engine import Engine
from dist_looksam.optim import table

STEPS = 7


class Twin(nn.Module):
    """Blocks in a list, and what the kind says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.enter = nn.Linear(7, 12)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.leave = nn.Linear(12, 3)
        if kind == "tied in the list":
            self.blocks[2].weight = self.blocks[0].weight
        if kind == "tied to the rest":
            self.again = nn.Linear(12, 12)
            self.again.weight = self.blocks[1].weight
        if kind == "frozen":
            self.blocks[1].weight.requires_grad_(False)
            self.enter.bias.requires_grad_(False)
        if kind == "unused":
            self.idle = nn.Parameter(torch.ones(5))
        if kind == "batch norm":
            self.norms = nn.ModuleList(nn.BatchNorm1d(12) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for i, block in enumerate(self.blocks):
            x = torch.tanh(block(x))
            if self.kind == "batch norm":
                x = self.norms[i](x)
        if self.kind == "tied to the rest":
            x = self.again(x)
        return self.leave(x)


def loss(model: nn.Module, samples: tuple) -> torch.Tensor:
    x, y = samples
    return F.cross_entropy(model(x).float(), y)


TWINS = ("blocks", "tied in the list", "tied to the rest", "frozen", "unused", "batch norm")


def _engine(kind: str, backend: str, precision: str) -> Engine:
    torch.manual_seed(1)
    model: nn.Module = Twin(kind)
    if backend == "fsdp2":
        shard(model, torch.device("cpu"), precision=precision)
    base = table.build_base("sgd", table.groups(model, 0.1), lr=0.05)
    optimizer = table.build(base, rule=table.rule_of("look_layer_sam", k=3), rho=0.02, alpha=0.4)
    made = {"fsdp2": FSDP2, "ddp": DDP, "plain": Plain}[backend]
    return Engine(made(model, optimizer, precision=precision), loss=loss)


def batches(step: int, whole: bool) -> list:
    if whole:
        return task.part(step, 0, 1, 2)
    return task.part(step, dist.get_rank(), dist.get_world_size(), 2)


def twin(kind: str, precision: str) -> dict:
    """Weights and buffers of both, after some steps; and how many units the network has."""
    other = "ddp" if kind == "batch norm" else "plain"
    found = {}
    for backend in ("fsdp2", other):
        engine = _engine(kind, backend, precision)
        for step in range(STEPS):
            engine.step(batches(step, whole=backend == "plain"))
        found["got" if backend == "fsdp2" else "want"] = engine.backend.full_weights()
        if backend == "fsdp2":
            found["units"] = len(engine.backend.units)
    torch.manual_seed(1)
    found["start"] = Twin(kind).state_dict()
    return found
