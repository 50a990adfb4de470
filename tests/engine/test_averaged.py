"""Inside `engine.averaged()` the averages stand for the weights: what would take them for weights
is refused, and leaves both as they were."""

import pytest
import torch

from dist_looksam import Engine, LookSAM, checkpoint, restore
from dist_looksam.errors import ConfigError


@pytest.fixture
def engine():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = LookSAM(net.parameters(), base, rho=0.1, k=2)
    engine = Engine(net, optimizer, lambda model, x: model(x).square().mean(), ema=0.5)
    for _ in range(4):
        engine.step(batches())
    return engine


def batches():
    return [torch.ones(4, 3)]


def nested(engine, _):
    with engine.averaged():
        pass


WRONG = {
    "a second `averaged`": nested,
    "a step": lambda engine, _: engine.step(batches()),
    "a checkpoint": lambda engine, folder: checkpoint.save(engine, folder / "inside"),
    "a restore": lambda engine, folder: restore(engine, folder / "before"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_would_take_averages_for_weights_is_refused_inside(engine, tmp_path, what):
    checkpoint.save(engine, tmp_path / "before")
    before = engine.backend.full_weights()
    with engine.averaged():
        average = engine.backend.full_weights()
        with pytest.raises(ConfigError, match=f"{what} must come after `with engine.averaged"):
            WRONG[what](engine, tmp_path)
        assert same(engine.backend.full_weights(), average)
    assert same(engine.backend.full_weights(), before) and not same(average, before)
    engine.step(batches())


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_an_error_inside_leaves_the_weights(engine):
    before = engine.backend.full_weights()
    with pytest.raises(KeyError), engine.averaged():
        raise KeyError
    assert same(engine.backend.full_weights(), before)


@pytest.mark.parametrize("decay", [0, 1, -0.1, "0.9"])
def test_a_decay_out_of_range_is_refused(decay):
    net = torch.nn.Linear(3, 2)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="ema must be"):
        Engine(net, base, lambda model, x: model(x).mean(), ema=decay)
