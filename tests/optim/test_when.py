"""Windows of looks, adaptive looks and factors of rho: as the float64 reference, step for step."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import problem
import pytest
import reference
import small
import torch
import torch.distributed.checkpoint as dcp
from build import LOOKS, build, g_v_of
from problem import GROUPS, Closure
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dist_looksam import SAM, LookLayerSAM, LookSAM
from dist_looksam.errors import ConfigError
from dist_looksam.optim.when import Adaptive

STEPS, K = 24, 3
NAMES = ("sam", "sam_k", "look_sam", "layer_sam", "look_layer_sam")
WITH_K = ("sam_k", "look_sam", "look_layer_sam")
WINDOWS = {"late": (17, None), "early": (0, 10), "middle": (5, 13), "one step": (8, 9)}
ADAPTIVE = {"looks": "adaptive"}


def check(name, *, base="adamw", bad=(), rho_scale=None, **how):
    """Both trainings, step by step; returns the truth."""
    passes = []

    def gradient(weights, t):
        passes.append(t)
        value, g = problem.gradient(weights, t)
        if (t, passes.count(t)) in bad:
            g[problem.W2][0, 1] = math.inf
        return value, g

    with np.errstate(invalid="ignore"):
        truth = reference.train(
            problem.start(), gradient, optimizer=name, base=base, steps=STEPS, lr=None,
            groups=GROUPS, rho=None, k=K, rho_scale=rho_scale, **how,
        )  # fmt: skip
    params = problem.parameters()
    optimizer = build(params, name, base, k=K, **how)
    closure = Closure(params, optimizer, bad=bad, spoil=math.inf)
    for t, record in enumerate(truth.records):
        if rho_scale is not None:
            optimizer.rho_scale = rho_scale(t)
        num_gradients = closure.step()
        assert optimizer.seen.look == record["look"], f"step {t}"
        assert num_gradients == 1 + record["look"] or (t, 1) in bad
        if name in LOOKS:
            has = ["g_v" in optimizer.state.get(x, {}) for x in params]
            assert has == [record["gv_norm"] > 0 or any(has)] * len(params), f"step {t}"
        for x, want in zip(params, truth.weights[t], strict=True):
            np.testing.assert_allclose(x.detach().numpy(), want, rtol=0, atol=1e-10)
    if truth.g_v is None:
        assert not any("g_v" in state for state in optimizer.state.values())
    elif name in LOOKS:
        for x, want in zip(g_v_of(optimizer, params), truth.g_v, strict=True):
            np.testing.assert_allclose(x.numpy(), want, rtol=0, atol=1e-9)
    return truth


def steps_that_look(truth):
    return [t for t, record in enumerate(truth.records) if record["look"]]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", NAMES)
def test_looks_happen_inside_the_window_alone(name, window):
    first, until = WINDOWS[window]
    truth = check(name, look_from=first, look_until=until)
    k = K if name in WITH_K else 1
    assert steps_that_look(truth) == list(range(first, until or STEPS, k))


@pytest.mark.parametrize("bad", [[(4, 1)], [(5, 2)], [(5, 1), (6, 2)], [(11, 2)], [(12, 1)],
                                 [(11, 1), (12, 1)], [(13, 1)]])  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_look_is_repeated_inside_the_window_alone(name, bad):
    """Before it, at its first and its last steps, and after it."""
    truth = check(name, bad=bad, look_from=5, look_until=13)
    assert [r["skipped"] for r in truth.records].count(True) == len(bad)
    assert set(steps_that_look(truth)) <= set(range(5, 13))


@pytest.mark.parametrize("bad", [(), [(0, 2), (6, 1), (7, 2)]])
@pytest.mark.parametrize("window", [(0, None), (7, 20)])
@pytest.mark.parametrize("name", WITH_K)
def test_adaptive_looks_are_those_of_the_reference(name, window, bad):
    first, until = window
    truth = check(name, bad=bad, look_from=first, look_until=until, **ADAPTIVE)
    looks = steps_that_look(truth)
    assert looks and set(looks) <= set(range(first, until or STEPS))
    assert looks != list(range(first, until or STEPS, K))


@pytest.mark.parametrize("base", ["sgd", "lamb"])
@pytest.mark.parametrize("name", NAMES)
def test_rho_follows_its_factor(name, base):
    check(name, base=base, rho_scale=lambda t: 0.5 + 0.1 * t)
    check(name, base=base, rho_scale=lambda t: float(t != K))


def test_where_all_norms_are_alike_adaptive_looks_are_periodic():
    """The variance is 0; comparing with the mean alone, every step would look."""
    x = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SAM([x], torch.optim.SGD([x], lr=0.1), k=5, looks="adaptive")

    def closure():
        optimizer.zero_grad()
        loss = x.sum()
        loss.backward()
        return loss

    looks = []
    for t in range(60):
        optimizer.step(closure)
        looks += [t] if optimizer.seen.look else []
    assert looks[1:] == list(range(looks[1], 60, 5))


SETTINGS = {
    "window": dict(look_from=3, look_until=15),
    "adaptive": dict(looks="adaptive"),
    "adaptive in a window": dict(looks="adaptive", look_from=3, look_until=17),
}  # fmt: skip


@pytest.mark.parametrize("done", [1, 2, 5, 9, 16])
@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("name", WITH_K)
def test_a_saved_state_goes_on_bit_for_bit(name, how, done):
    """By state_dict, and as a copy."""
    params = problem.parameters()
    optimizer = build(params, name, "adamw", k=K, **SETTINGS[how])
    optimizer.rho_scale = 0.25
    closure = problem.train(params, optimizer, done)
    others = [x.detach().clone().requires_grad_() for x in params]
    other = build(others, name, "adamw", k=K, **SETTINGS[how])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.rho_scale == 0.25
    again = Closure(others, other)
    again.t = done
    copied = copy.deepcopy((params, optimizer))
    third = Closure(*copied)
    third.t = done
    for t in range(done, STEPS):
        expected = closure.step()
        assert again.step() == third.step() == expected, f"step {t}"
        assert all(map(torch.equal, params, others)) and all(map(torch.equal, params, copied[0]))


@pytest.mark.parametrize("done", [2, 7, 19])
@pytest.mark.parametrize("how", SETTINGS)
def test_torch_distributed_checkpoint_saves_what_decides(how, done, tmp_path):
    """Before, in and after the window. Where no g_v was saved, the loader must allow that."""

    whole, other = (
        small.engine(small.net(), "look_sam", "adamw", k=K, **SETTINGS[how]) for _ in range(2)
    )
    whole.optimizer.rho_scale, other.optimizer.rho_scale = 0.5, 1.0
    for t in range(done):
        whole.step(small.micro_batches(t))
    saved = get_optimizer_state_dict(whole.module, whole.optimizer)
    dcp.save({"model": whole.module.state_dict(), "optimizer": saved}, checkpoint_id=tmp_path)
    into = {
        "model": other.module.state_dict(),
        "optimizer": get_optimizer_state_dict(other.module, other.optimizer),
    }
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(into, checkpoint_id=tmp_path, planner=planner)
    other.module.load_state_dict(into["model"])
    set_optimizer_state_dict(other.module, other.optimizer, into["optimizer"])
    assert other.optimizer.rho_scale == 0.5
    for t in range(done, done + 8):
        looked = whole.step(small.micro_batches(t)).look
        assert other.step(small.micro_batches(t)).look == looked, f"step {t}"
        assert all(map(torch.equal, whole.module.parameters(), other.module.parameters()))


def test_defaults_save_the_counters_that_they_always_saved():
    """A state of torch.distributed.checkpoint must have every key of the optimizer that loads."""
    params = problem.parameters()
    assert set(build(params, "look_sam").state_dict()["sharpness"]) == {"steps", "owed"}


@pytest.mark.parametrize("how, sentence", [
    (dict(look_from=5, look_until=5), "look_from must be before look_until"),
    (dict(look_from=0.9), "look_from must be a whole number"),
    (dict(look_until=-1), "look_until must be a whole number"),
    (dict(looks="sometimes"), "looks must be one of periodic, adaptive"),
    (dict(looks="adaptive", k=1), "k must be >= 2"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [SAM, LookSAM, LookLayerSAM])
def test_what_cannot_be_is_a_sentence(kind, how, sentence):
    params = problem.parameters()
    with pytest.raises(ConfigError, match=sentence):
        kind(params, torch.optim.SGD(params, lr=0.1), **how)


@pytest.mark.parametrize("scale", [-0.5, math.nan, math.inf])
def test_a_factor_of_rho_that_is_none_is_a_sentence(scale):
    optimizer = build(problem.parameters(), "sam")
    with pytest.raises(ConfigError, match="rho_scale must be >= 0"):
        optimizer.rho_scale = scale


@pytest.mark.parametrize(
    ("before", "after"),
    [({"k": 5}, {"k": 10}), ({"k": 6}, {"k": 3}),
     ({"k": 5, "end": 500}, {"k": 5}), ({"k": 5, "end": 500}, {"k": 5, "end": 1300})],
)  # fmt: skip
def test_adaptive_looks_keep_their_share_where_a_checkpoint_is_of_another_k_or_window(
    before, after
):
    """Steps of another k, or outside the window, made up for by no looks or by looks alone."""
    random, looks = np.random.default_rng(0), []
    old, new = (Adaptive(first=0, **how) for how in (before, after))
    for t in range(1300):
        decider = old if t < 1000 else new
        if t == 1000:
            new.load(json.loads(json.dumps(old.state())))
        look = decider.due(t) and t < (decider.end or t + 1)
        norm = torch.tensor(random.lognormal(0, 0.3))
        seen = SimpleNamespace(grad_norm=norm, finite=torch.tensor(True), look=look)
        decider.record(t, seen)
        looks.append(look)
    assert sum(looks[1000:]) == pytest.approx(300 / after["k"], abs=5)
