"""Engine on one rank: means over micro-batches, passes, clipping, settings."""

import numpy as np
import pytest
import reference
import small
import torch
from torch import nn

from dist_looksam import ConfigError, Engine
from dist_looksam.optim.table import BASES, METHODS

STEPS = 20


def train(engine, steps=STEPS, *, accumulation=1, dtype=torch.float64):
    return [engine.step(small.micro_batches(t, accumulation=accumulation, dtype=dtype))
            for t in range(steps)]  # fmt: skip


def test_the_loss_reported_is_the_mean_over_the_global_batch_at_w():
    """On looks too: not the loss at w + eps, and not the last micro-batch's."""
    model = small.net()
    engine = small.engine(model, "look_sam")
    for t in range(7):
        want = float(small.loss(model, small.batch(t)).detach())
        got = engine.step(small.micro_batches(t, accumulation=4))
        assert float(got.loss) == pytest.approx(want, rel=1e-6)
        assert got.step == t


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("name", list(reference.TABLE))
def test_every_method_with_accumulation_is_what_the_reference_says(name, accumulation):
    """Float64, so that only the order of additions separates them."""
    truth = small.truth(name, steps=STEPS)
    model = small.net()
    done = train(small.engine(model, name), accumulation=accumulation)
    for got, want in zip(small.weights(model), truth.weights[-1], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    for step, record in zip(done, truth.records, strict=True):
        assert step.look == record["look"]
        assert float(step.seen.grad_norm) == pytest.approx(record["grad_norm"], rel=1e-9)
        assert float(step.seen.update_norm) == pytest.approx(record["update_norm"], rel=1e-9)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_row_trains_the_same_however_a_batch_is_cut(name):
    """Also the rows whose formula the reference does not have."""
    whole, parts = small.net(), small.net()
    train(small.engine(whole, name))
    train(small.engine(parts, name), accumulation=3)
    for got, want in zip(small.weights(parts), small.weights(whole), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["adamw", "look_sam", "look_layer_sam"])
def test_clipping_is_applied_once_to_what_the_base_gets(name):
    free = small.truth(name, steps=STEPS)
    limit = float(np.median([r["update_norm"] for r in free.records]))  # clips about half of them
    truth = small.truth(name, steps=STEPS, clip=limit)
    model = small.net()
    done = train(small.engine(model, name, clip=limit), accumulation=2)
    clipped = [float(d.seen.update_norm) == pytest.approx(limit) for d in done]
    assert any(clipped) and not all(clipped)
    assert all(float(d.seen.update_norm) <= limit * (1 + 1e-9) for d in done)
    for got, want in zip(small.weights(model), truth.weights[-1], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name, passes", [
    ("sam", 40), ("sam_k", 24), ("look_sam", 24), ("layer_sam", 40), ("look_layer_sam", 24),
])  # fmt: skip
def test_passes_are_those_that_were_really_made(name, passes, base):
    """20 steps at k = 5 are 24 passes; a well-known LookSAM made 40 whatever k was."""
    made = []

    def counted(model, pair):
        made.append(1)
        return small.loss(model, pair)

    engine = small.engine(small.net(), name, base, k=5, loss=counted)
    done = train(engine, accumulation=2)
    assert engine.passes == passes == len(made) / 2 == STEPS + sum(d.look for d in done)


def test_a_plain_torch_optimizer_never_looks_and_trains_as_without_the_engine():
    ours, theirs = small.net(), small.net()
    engine = Engine(ours, torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9), small.loss)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for t in range(5):
        assert not engine.step(small.micro_batches(t)).look
        sgd.zero_grad()
        small.loss(theirs, small.batch(t)).backward()
        sgd.step()
    assert engine.passes == 5
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(got, want)


def test_on_one_rank_its_own_gradient_perturbs_as_the_global_one():
    trained = []
    for ascent in ("global", "rank"):
        model = small.net()
        train(small.engine(model, "look_sam", ascent=ascent), accumulation=2)
        trained.append(model)
    for a, b in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrong, says", [
    ({"clip": 0.0}, "clip must be > 0"),
    ({"clip": float("nan")}, "clip must be > 0"),
    ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16"),
    ({"ascent": "local"}, "ascent must be one of global, rank"),
    ({"loss": None}, "Engine needs loss"),
])  # fmt: skip
def test_a_wrong_setting_is_refused_at_construction(wrong, says):
    model = nn.Linear(2, 2)
    settings = {"loss": small.loss, **wrong}
    with pytest.raises(ConfigError, match=says):
        Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), **settings)


def test_a_module_without_an_optimizer_is_refused():
    with pytest.raises(ConfigError, match="needs an optimizer"):
        Engine(nn.Linear(2, 2), loss=small.loss)
