"""m on one rank: groups of samples climb together, each to its own w + eps."""

import copy

import numpy as np
import pytest
import small
import torch
from torch import nn

from dist_looksam import ConfigError
from dist_looksam.maths.together import groups

STEPS = 20
METHODS = ("sam", "look_sam", "layer_sam", "look_layer_sam", "gsam")
# (micro-batches of 12 samples, m)
CUTS = [(12, 1), (6, 4), (4, 3), (2, 6), (2, 2)]


def train(engine, accumulation: int, steps: int = STEPS):
    return [engine.step(small.micro_batches(t, accumulation=accumulation)) for t in range(steps)]


@pytest.mark.parametrize("accumulation, m", CUTS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_every_m_is_what_the_reference_says(name, accumulation, m):
    """Float64, so that only the order of additions separates them."""
    truth = small.truth(name, steps=STEPS, m=m)
    model = small.net()
    engine = small.engine(model, name, m=m)
    done = train(engine, accumulation)
    for got, want in zip(small.weights(model), truth.weights[-1], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)
    for step, record in zip(done, truth.records, strict=True):
        assert step.look == record["look"]
        assert float(step.loss) == pytest.approx(record["loss"], rel=1e-6)
        assert float(step.seen.grad_norm) == pytest.approx(record["grad_norm"], rel=1e-9)
        assert float(step.seen.update_norm) == pytest.approx(record["update_norm"], rel=1e-9)
    assert engine.passes == STEPS + sum(d.look for d in done)


@pytest.mark.parametrize("clip, base", [(0.05, "sgd"), (None, "lars")])
def test_clipping_and_other_bases_see_the_means_over_groups(clip, base):
    truth = small.truth("look_sam", base, steps=STEPS, m=3, clip=clip)
    model = small.net()
    train(small.engine(model, "look_sam", base, m=3, clip=clip), 4)
    for got, want in zip(small.weights(model), truth.weights[-1], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("how", [{"m": small.SAMPLES}, {"ascent": "rank"}])
@pytest.mark.parametrize("name", METHODS)
def test_the_whole_batch_as_one_group_is_bit_equal_to_no_m(name, how):
    ends = []
    for given in ({}, how):
        model = small.net()
        train(small.engine(model, name, **given), 3)
        ends.append(model)
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_method_without_ascent_takes_no_notice_of_m():
    ends = []
    for given in ({}, {"m": 5}):
        model = small.net()
        train(small.engine(model, "adamw", **given), 3, steps=3)
        ends.append(model)
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert torch.equal(a, b)


class Drawing:
    """small.loss times a number drawn; notes the numbers, and spoils or raises in one call."""

    def __init__(self, at: int = -1, *, raises: bool = False) -> None:
        self.at, self.raises, self.calls, self.drawn = at, raises, 0, []

    def __call__(self, model, pair):
        self.calls += 1
        self.drawn.append(float(torch.rand(())))
        value = small.loss(model, pair) * (1 + 0.1 * self.drawn[-1])
        if self.calls == self.at and self.raises:
            raise MemoryError
        return value * float("inf") if self.calls == self.at else value


def test_each_group_draws_the_same_numbers_in_both_passes_and_all_as_one_pass_would():
    loss, once = Drawing(), Drawing()
    for given, m in ((loss, 6), (once, None)):
        engine = small.engine(small.net(), "look_sam", loss=given, m=m)
        torch.manual_seed(3)
        engine.step(small.micro_batches(0, accumulation=4))
        after = torch.rand(3)
    a, b, c, d = once.drawn[:4]
    assert loss.drawn == [a, b, a, b, c, d, c, d]
    torch.manual_seed(3)
    torch.rand(()), torch.rand(()), torch.rand(()), torch.rand(())
    assert torch.equal(after, torch.rand(3))


def test_buffers_are_as_one_pass_leaves_them():
    ends = []
    for name in ("adamw", "sam"):
        model = small.net(nn.BatchNorm1d(small.HIDDEN, momentum=0.3))
        small.engine(model, name, m=3).step(small.micro_batches(0, accumulation=4))
        ends.append([b.clone() for b in model.buffers()])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def everything(engine) -> list:
    saved = engine.optimizer.state_dict()
    tensors = [v for s in saved["state"].values() for v in s.values() if torch.is_tensor(v)]
    return copy.deepcopy([*engine.module.state_dict().values(), *tensors])


@pytest.mark.parametrize("call", range(1, 9))
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_bad_group_skips_the_whole_step_and_the_next_looks_again(precision, call):
    """Four groups of one micro-batch; the call-th of the eight passes is infinite."""
    loss = Drawing(at=2 * 4 + 2 * 4 + call)  # of a look and two other steps
    how = {"loss": loss, "precision": precision, "k": 3}
    model = small.net(dtype=torch.float32)
    engine = small.engine(model, "look_sam", m=3, **how)

    def step(t):
        return engine.step(small.micro_batches(t, accumulation=4, dtype=torch.float32))

    for t in range(3):
        step(t)
    before, scaler = everything(engine), engine.backend.scaler
    done = step(3)
    assert done.look and not done.seen.finite
    assert all(map(torch.equal, before, everything(engine)))
    assert scaler is None or scaler.scale == 2.0**15
    again = step(4)
    assert again.look and again.seen.finite


@pytest.mark.parametrize("call", range(1, 9))
def test_a_group_that_raises_leaves_everything_as_before_the_step(call):
    ends = []
    for at in (-1, 2 * 4 + 2 * 4 + call):
        loss = Drawing(at, raises=True)
        model = small.net(nn.BatchNorm1d(small.HIDDEN), nn.Dropout(0.3))
        engine = small.engine(model, "look_layer_sam", loss=loss, m=3)
        torch.manual_seed(5)
        for t in range(3):
            engine.step(small.micro_batches(t, accumulation=4))
        if at > 0:
            before = everything(engine)
            with pytest.raises(MemoryError):
                engine.step(small.micro_batches(50, accumulation=4))
            assert all(map(torch.equal, before, everything(engine)))
        for t in range(3, 6):
            engine.step(small.micro_batches(t, accumulation=4))
        ends.append(everything(engine))
    assert all(map(torch.equal, *ends))


def test_a_resume_between_looks_goes_on_to_the_bit():
    model = small.net()
    engine = small.engine(model, "look_sam", m=4, k=5)
    train(engine, 3, steps=7)
    fresh = small.net()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    other = small.engine(fresh, "look_sam", m=4, k=5)
    other.optimizer.load_state_dict(copy.deepcopy(engine.optimizer.state_dict()))
    for t in range(7, 14):
        for e in (engine, other):
            e.step(small.micro_batches(t, accumulation=3))
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("m, says", [
    (5, "got 5 with 6 x 1 micro-batches of 2; use m=[46], which is the nearest, or another"),
    (24, "got 24 with .*; use m=12,"),
    (8, "got 8 with .*; use m=6,"),
])  # fmt: skip
def test_an_m_that_micro_batches_do_not_make_up_is_one_sentence(m, says):
    engine = small.engine(small.net(), "look_sam", m=m)
    with pytest.raises(ConfigError, match=says):
        engine.step(small.micro_batches(0, accumulation=6))


@pytest.mark.parametrize("how, says", [
    ({"m": 0}, "m must be a whole number of samples >= 1, got 0"),
    ({"m": 2.0}, "m must be a whole number of samples >= 1, got 2.0"),
    ({"m": True}, "m must be a whole number of samples >= 1, got True"),
    ({"m": 4, "ascent": "rank"}, "m and ascent rank must not both be given, got m 4"),
])  # fmt: skip
def test_an_m_that_is_no_number_of_samples_is_refused_at_construction(how, says):
    with pytest.raises(ConfigError, match=says):
        small.engine(small.net(), "look_sam", **how)


@pytest.mark.parametrize(
    "how, got", [({"m": 4}, "got m 4"), ({"ascent": "rank"}, "got ascent rank")]
)
def test_msam_has_no_groups(how, got):
    """m was taken and did nothing: msam climbs along the base's momentum, the same for all."""
    with pytest.raises(ConfigError, match=f"m must be the whole batch.* {got}; leave it out"):
        small.engine(small.net(), "msam", **how)


def test_micro_batches_of_unknown_size_cannot_be_counted():
    model = small.net()
    engine = small.engine(
        model, "sam", loss=lambda model, t: small.loss(model, small.batch(t)), m=4
    )
    with pytest.raises(ConfigError, match="m counts samples, got micro-batches of unknown size"):
        engine.step([0, 1])


@pytest.mark.parametrize("climbing, m, says", [
    ([4], 8, "m must be one of 32, 64, 96, 192 on backend zero with 6 x 4 micro-batches of 8, got "
        "8 by hand; use m=32, or backend ddp"),
    ([4], 4, "got 4 by hand; use m=32, or backend ddp"),
    ([2, 4], 8, "m must be one of 16, 32, 64, 96, 192 .* got 8 by hand; use m=16, or backend ddp"),
    ([4], 24, "got 24 by hand with .*; use m=32,"),
])  # fmt: skip
def test_what_a_backend_cannot_do_names_the_nearest_and_the_backend_that_can(climbing, m, says):
    how = {"micro_batch": 8, "accumulation": 6, "ranks": 4, "climbing": climbing}
    with pytest.raises(ConfigError, match=says):
        groups(m, **how, backend="zero", why=" by hand")
