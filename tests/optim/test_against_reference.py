"""Every optimizer, on every base, is what the reference says, step for step."""

import math
import os

import numpy as np
import problem
import pytest
import reference
import torch
from build import BASES, LOOKS, SHARP, build, build_base, g_v_of
from problem import GROUPS, Closure

from dist_looksam import LookSAM

K = 3
STEPS = 13 if os.environ.get("TRITON_INTERPRET") == "1" else 20  # both QUIET steps are among them

# In float64 only rounding separates the two. In float32 Adam's g / (sqrt(v) + eps) would turn the
# rounding of a gradient near 0 into a step of the order of lr; eps = 1e-4 keeps it rounding.
CLOSE = {torch.float64: (1e-10, 1e-8), torch.float32: (1e-5, 1e-4)}


def check(name, base, dtype, groups=GROUPS, **how):
    tolerance, eps = CLOSE[dtype]
    truth = reference.train(
        problem.start(), problem.gradient, optimizer=name, base=base, steps=STEPS, lr=None,
        groups=groups, rho=None, k=K, eps=eps, **how,
    )  # fmt: skip
    params = problem.parameters(dtype)
    optimizer = build(params, name, base, k=K, eps=eps, groups=groups, **how)
    closure = Closure(params, optimizer)
    for t in range(STEPS):
        num_gradients = closure.step()
        assert num_gradients == 1 + truth.records[t]["look"], f"step {t}"
        for i, (x, want) in enumerate(zip(params, truth.weights[t], strict=True)):
            np.testing.assert_allclose(
                x.detach().double().numpy(), want, rtol=0, atol=tolerance,
                err_msg=f"step {t}, layer {i}",
            )  # fmt: skip
    if name in LOOKS:
        for x, want in zip(g_v_of(optimizer, params), truth.g_v, strict=True):
            np.testing.assert_allclose(x.double().numpy(), want, rtol=0, atol=10 * tolerance)


both = pytest.mark.parametrize("dtype", list(CLOSE), ids=str)


@both
@pytest.mark.parametrize("base", BASES)
def test_the_bases_alone(base, dtype):
    check(base, base, dtype)


@both
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SHARP)
def test_every_method_on_every_base(name, base, dtype):
    check(name, base, dtype)


@both
@pytest.mark.parametrize("p", [1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("name", ["sam", "sam_k", "look_sam", "gsam", "msam"])
def test_the_p_norms(name, p, dtype):
    check(name, "sgd", dtype, p=p)


@both
@pytest.mark.parametrize("base", ["sgd", "lamb"])
@pytest.mark.parametrize("name", ["layer_sam", "look_layer_sam"])
def test_the_ascent_as_printed(name, base, dtype):
    check(name, base, dtype, layer_ascent="literal")


@both
@pytest.mark.parametrize("reuse", ["paper", "natural"])
@pytest.mark.parametrize("decompose", ["model", "layer"])
@pytest.mark.parametrize("name", LOOKS)
def test_every_way_to_take_apart_and_use_again(name, decompose, reuse, dtype):
    check(name, "sgd", dtype, decompose=decompose, reuse=reuse)


@both
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name, how", [
    *((name, {}) for name in SHARP), ("sam", {"p": 3.0}), ("sam", {"p": math.inf}),
    ("layer_sam", {"layer_ascent": "literal"}),
])  # fmt: skip
def test_one_group_perturbed_and_the_other_not(name, how, which, dtype):
    groups = [group | {"perturb": n == which} for n, group in enumerate(GROUPS)]
    check(name, "sgd", dtype, groups=groups, **how)


@both
def test_gsam_layer_by_layer(dtype):
    check("gsam", "sgd", dtype, decompose="layer")


@pytest.mark.parametrize("clip", [0.5, 1e9])
@pytest.mark.parametrize("name", SHARP)
def test_clipping_and_what_a_step_says_it_did(name, clip):
    """`clip` and `seen` are what training loops set and log. Lengths near .5 are common here."""
    truth = reference.train(
        problem.start(), problem.gradient, optimizer=name, base="adamw", steps=STEPS, lr=None,
        groups=GROUPS, rho=None, k=K, clip=clip,
    )  # fmt: skip
    assert any(abs(r["update_norm"] - clip) < 1e-9 for r in truth.records) == (clip == 0.5)
    params = problem.parameters()
    optimizer = build(params, name, "adamw", k=K)
    optimizer.clip = clip
    closure = Closure(params, optimizer)
    for t, record in enumerate(truth.records):
        closure.step()
        seen = optimizer.seen
        assert seen.look == record["look"] and bool(seen.finite)
        assert float(seen.grad_norm) == pytest.approx(record["grad_norm"], rel=1e-9, abs=1e-12)
        assert float(seen.update_norm) == pytest.approx(record["update_norm"], rel=1e-9, abs=1e-12)
        if name in LOOKS:
            assert float(seen.gv_norm) == pytest.approx(record["gv_norm"], rel=1e-7, abs=1e-12)
        for x, want in zip(params, truth.weights[t], strict=True):
            np.testing.assert_allclose(x.detach().numpy(), want, rtol=0, atol=1e-10)


def test_the_numbers_may_stand_on_the_optimizer_and_hold_for_all_groups():
    """rho and alpha given once, params as one generator, hold for both of the base's groups."""
    groups = [{x: v for x, v in g.items() if x not in ("rho", "alpha")} for g in GROUPS]
    truth = reference.train(
        problem.start(), problem.gradient, optimizer="look_sam", base="sgd", steps=8, lr=None,
        groups=groups, rho=0.05, alpha=0.6, k=K,
    )  # fmt: skip
    params = problem.parameters()
    optimizer = LookSAM((x for x in params), build_base(params, "sgd"), rho=0.05, alpha=0.6, k=K)
    problem.train(params, optimizer, 8)
    for x, want in zip(params, truth.weights[-1], strict=True):
        np.testing.assert_allclose(x.detach().numpy(), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_spoilt_gradient_of_msam_costs_one_step_and_nothing_else(at, base):
    """Also the first step, before which there is no momentum."""

    def gradient(weights, t):
        value, g = problem.gradient(weights, t)
        if t == at:
            g[problem.W2][0, 1] = math.nan
        return value, g

    with np.errstate(invalid="ignore"):
        truth = reference.train(
            problem.start(), gradient, optimizer="msam", base=base, steps=6, lr=None,
            groups=GROUPS, rho=None,
        )  # fmt: skip
    assert [r["skipped"] for r in truth.records] == [t == at for t in range(6)]
    params = problem.parameters()
    closure = Closure(params, build(params, "msam", base), bad=[(at, 1)])
    for t in range(6):
        assert closure.step() == 1
        for x, want in zip(params, truth.weights[t], strict=True):
            np.testing.assert_allclose(x.detach().numpy(), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("spoil", [math.nan, -math.inf])
@pytest.mark.parametrize("bad", [[(0, 1)], [(0, 2)], [(3, 1)], [(3, 2)], [(3, 2), (4, 2)], [(4, 1)],
                                 [(2, 1), (3, 1)]])  # fmt: skip
@pytest.mark.parametrize("name", ["look_sam", "sam_k", "gsam"])
def test_a_spoilt_gradient_costs_one_step_and_nothing_else(name, bad, spoil):
    """Either pass, look or reuse step, first look or later: then on as if it had not been."""
    passes = []

    def gradient(weights, t):
        passes.append(t)
        value, g = problem.gradient(weights, t)
        if (t, passes.count(t)) in bad:
            g[problem.W2][0, 1] = spoil
        return value, g

    with np.errstate(invalid="ignore"):
        truth = reference.train(
            problem.start(), gradient, optimizer=name, base="adamw", steps=8, lr=None,
            groups=GROUPS, rho=None, k=K,
        )  # fmt: skip
    assert [r["skipped"] for r in truth.records].count(True) == len(bad)
    params = problem.parameters()
    optimizer = build(params, name, "adamw", k=K)
    closure = Closure(params, optimizer, bad=bad, spoil=spoil)
    for t in range(8):
        num_gradients = closure.step()
        record = truth.records[t]
        if (t, 1) in bad:
            # Whether the second gradient is still asked for is the optimizer's to choose.
            assert num_gradients <= 2
        else:
            assert num_gradients == 1 + record["look"], f"step {t}"
        for x, want in zip(params, truth.weights[t], strict=True):
            np.testing.assert_allclose(x.detach().numpy(), want, rtol=0, atol=1e-10)
