"""Both passes of a look draw the same numbers, of every default generator, and leave every buffer
as one pass would."""

import random

import numpy as np
import pytest
import torch
from build import same_bits
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from dist_looksam import SAM, Engine
from dist_looksam.optim.replay import Replay

DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "python": random.random,
    "python, gaussian": lambda: random.gauss(0.0, 1.0),  # draws two and keeps one
    "numpy": lambda: float(np.random.rand()),
    "numpy, gaussian": lambda: float(np.random.randn()),
}


def seed():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def by_closure(model, loss):
    optimizer = SAM(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1), model=model)

    def closure():
        optimizer.zero_grad()
        value = loss(model, torch.ones(4, 3))
        value.backward()
        return value

    return lambda: optimizer.step(closure)


def by_engine(model, loss):
    optimizer = SAM(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1))
    engine = Engine(model, optimizer, loss)
    return lambda: engine.step([torch.ones(4, 3)])


both = pytest.mark.parametrize("make", [by_closure, by_engine])


@both
@pytest.mark.parametrize("name", DRAWS)
def test_the_passes_draw_the_same_numbers_and_steps_others(make, name):
    """timm's Mixup draws from NumPy: the two gradients of "the same samples" differed by 45 %."""
    seen = []

    def loss(model, x):
        seen.append(DRAWS[name]())
        return (model(x) * seen[-1]).sum()

    step = make(nn.Linear(3, 2), loss)
    seed()
    for _ in range(3):
        step()
    assert seen[0::2] == seen[1::2] and len(set(seen)) == 3
    after = DRAWS[name]()
    seed()
    assert [DRAWS[name]() for _ in range(4)] == [*seen[0::2], after]


class Moving(nn.Module):
    """Buffers that a forward changes: in place, through .data, by another tensor, and a count."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        for name in ("in_place", "by_data", "other", "hidden"):
            self.register_buffer(name, torch.zeros(2), persistent=name != "hidden")
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.arange(4).expand(2, 4))  # cannot be written to

    def forward(self, x):
        y = self.layer(x)
        with torch.no_grad():
            self.in_place.add_(y.mean(0))
            self.by_data.data.mul_(0.9).add_(y.mean(0))
            self.other = 0.9 * self.other + y.mean(0)
            self.hidden += 1
            self.calls += 1
        return y


NETS = {
    "spectral_norm": lambda: spectral_norm(nn.Linear(3, 2)),
    "spectral_norm, old": lambda: old_spectral_norm(nn.Linear(3, 2)),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
    "own buffers": Moving,
}


def mean_square(model, x):
    return (model(x + torch.arange(12.0).view(4, 3)) ** 2).mean()


def held(model):
    return [*model.parameters(), *model.buffers()]


@both
@pytest.mark.parametrize("name", NETS)
def test_buffers_are_as_one_pass_leaves_them(make, name):
    """spectral_norm's vectors took two iterations on a look; a count of calls counted two."""
    torch.manual_seed(0)
    model, once = NETS[name](), NETS[name]()
    for _ in range(3):
        with torch.no_grad():
            for to, x in zip(held(once), held(model), strict=True):
                if to.is_contiguous():
                    to.copy_(x)
        mean_square(once, torch.ones(4, 3))
        make(model, mean_square)()
        assert same_bits(model.buffers(), once.buffers())


@both
@pytest.mark.parametrize("name", NETS)
def test_a_skipped_step_leaves_all_buffers_as_before(make, name):
    torch.manual_seed(0)
    model = NETS[name]()
    before = [b.clone() for b in model.buffers()]
    make(model, lambda m, x: mean_square(m, x) * float("inf"))()
    assert same_bits(model.buffers(), before)


def test_large_tables_of_whole_numbers_are_not_copied():
    """4-bit weights are such buffers, and larger than all that is trained."""
    model = nn.Linear(2, 2)
    model.register_buffer("packed", torch.zeros(2**16, dtype=torch.int32))
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    assert [b.name for b in Replay(model)._buffers_before] == ["count"]
