"""m smaller than a micro-batch: a look splits micro-batches, other steps take them whole."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import small
import torch
from torch import nn

from dist_looksam import ConfigError, Engine, LookLayerSAM, LookSAM
from dist_looksam.backends.batches import split

Pair = namedtuple("Pair", "x y")
STEPS, SAMPLES = 7, 24


def batch(t):
    draw = torch.Generator().manual_seed(t)
    return torch.randn(SAMPLES, 6, generator=draw).double(), torch.randint(
        0, 3, (SAMPLES,), generator=draw
    )


def weights(kind, m, micro_batch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = kind(net.parameters(), torch.optim.AdamW(net.parameters(), lr=0.05), rho=0.1, k=3)
    sizes = []

    def loss(model, pair):
        sizes.append(len(pair[0]))
        return nn.functional.cross_entropy(model(pair[0]), pair[1])

    engine = Engine(net, optimizer, loss, clip=1.0, m=m)
    for t in range(STEPS):
        x, y = batch(t)
        engine.step(list(zip(x.split(micro_batch), y.split(micro_batch))))
    return torch.cat([p.detach().flatten() for p in net.parameters()]), sizes, engine.passes


@pytest.mark.parametrize("kind", [LookSAM, LookLayerSAM])
def test_a_part_of_a_micro_batch_climbs_as_a_micro_batch_of_its_size(kind):
    small_ones, sizes, passes = weights(kind, 4, 4)
    assert {*sizes} == {4}
    for micro_batch in (8, 12, 24):
        large, sizes, same_passes = weights(kind, 4, micro_batch)
        torch.testing.assert_close(large, small_ones, rtol=0, atol=1e-14)
        looks = 3  # steps 0, 3, 6: both passes in parts of 4
        count = SAMPLES // micro_batch
        assert sizes.count(4) == looks * 2 * SAMPLES // 4 and same_passes == passes
        assert sizes.count(micro_batch) == (STEPS - looks) * count
    assert float((weights(kind, None, 8)[0] - small_ones).abs().max()) > 1e-3


def test_without_rho_no_groups_are_made_whose_rounding_reuse_would_enlarge():
    """With rho 0 g_s is g. In groups both were added up in other orders, so that g_v was rounding
    noise, which paper's reuse then made as long as alpha ||g||."""
    net = small.net(dtype=torch.float32)
    sizes = []

    def loss(model, pair):
        sizes.append(len(pair[0]))
        return small.loss(model, pair)

    optimizer = LookSAM(net.parameters(), torch.optim.SGD(net.parameters(), 0.1), rho=0.0, k=2)
    engine = Engine(net, optimizer, loss, m=2)
    done = engine.step(small.micro_batches(0, accumulation=2, dtype=torch.float32))
    assert done.look and float(done.seen.gv_norm) == 0 and {*sizes} == {small.SAMPLES // 2}
    optimizer.param_groups[0]["rho"], optimizer.rho_scale = 0.1, 0.0
    engine.step(small.micro_batches(1, accumulation=2, dtype=torch.float32))
    engine.step(small.micro_batches(2, accumulation=2, dtype=torch.float32))
    assert {*sizes} == {small.SAMPLES // 2}
    optimizer.rho_scale = 1.0
    engine.step(small.micro_batches(3, accumulation=2, dtype=torch.float32))
    engine.step(small.micro_batches(4, accumulation=2, dtype=torch.float32))
    assert {*sizes} == {small.SAMPLES // 2, 2}


@dataclass
class Sample:
    x: torch.Tensor
    name: str


@pytest.mark.parametrize(
    "value",
    [
        (torch.arange(6), torch.arange(12).view(6, 2)),
        [torch.arange(6), 5, torch.tensor(1.0)],
        {"x": torch.arange(6), "kind": "a"},
        UserDict(x=torch.arange(6)),
        Pair(torch.arange(6), torch.arange(6)),
        Sample(torch.arange(6), "b"),
        torch.arange(6),
    ],
)
def test_batches_of_every_kind_are_split_and_stay_of_their_kind(value):
    parts = split(value, 3)
    assert len(parts) == 3 and all(type(part) is type(value) for part in parts)
    first = parts[1]
    x = first if isinstance(first, torch.Tensor) else getattr(first, "x", None)
    if x is None:
        x = first["x"] if isinstance(first, dict | UserDict) else first[0]
    assert x.tolist() == [2, 3]


@pytest.mark.parametrize(
    "odd", [(torch.zeros(4), torch.zeros(3)), "text", (torch.zeros(5), torch.zeros(5))]
)
def test_a_batch_that_cannot_be_split_is_refused(odd):
    with pytest.raises(ConfigError, match="m smaller than a micro-batch needs batches whose"):
        split(odd, 2)


def test_m_without_known_sizes_is_refused():
    net = small.net()
    engine = Engine(net, LookSAM(net.parameters(), torch.optim.SGD(net.parameters(), 0.1), rho=0.1),
                    lambda model, b: model(b()).sum(), m=2)  # fmt: skip
    with pytest.raises(ConfigError, match="m counts samples, got micro-batches of unknown size"):
        engine.step([lambda: torch.zeros(4, 3)])
