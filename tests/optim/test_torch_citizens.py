"""Real torch.optim optimizers: schedulers, groups, frozen layers, and settings that are wrong."""

import warnings

import numpy as np
import problem
import pytest
import reference
import torch
from build import build, copies, g_v_of, same_bits
from problem import B1, GROUPS, IDLE, SHIFT, W1, Closure
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from dist_looksam import SAM, Lamb, Lars, LookLayerSAM, LookSAM
from dist_looksam.errors import ConfigError

# --- schedulers and groups -----------------------------------------------------------------------


def halving(t):
    return 0.5 ** (t // 2)


@pytest.mark.parametrize("outer", [True, False], ids=["on the wrapper", "on the base"])
@pytest.mark.parametrize("name", ["sam", "look_sam", "look_layer_sam"])
def test_a_scheduler_on_either_object_reaches_the_weights(name, outer):
    groups = [{**g, "lr_scale": g["lr"]} for g in GROUPS]
    for group in groups:
        del group["lr"]
    truth = reference.train(
        problem.start(), problem.gradient, optimizer=name, base="sgd", steps=8, lr=halving,
        groups=groups, rho=None, k=3,
    )  # fmt: skip
    params = problem.parameters()
    optimizer = build(params, name, "sgd")
    closure = Closure(params, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when it thinks no step came before it
        scheduler = LambdaLR(optimizer if outer else optimizer.base_optimizer, halving)
        for _ in range(8):
            closure.step()
            scheduler.step()
    for x, want in zip(params, truth.weights[-1], strict=True):
        np.testing.assert_allclose(x.detach().numpy(), want, rtol=0, atol=1e-10)


def test_a_scheduler_that_also_moves_the_momentum_finds_it():
    params = problem.parameters()
    optimizer = build(params, "look_sam", "sgd")
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=True)
    problem.train(params, optimizer, 1)
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["momentum"] != 0.9


@pytest.mark.parametrize("name", ["sam", "look_sam", "layer_sam", "look_layer_sam"])
def test_they_are_optimizers_around_one_list_of_groups(name):
    params = problem.parameters()
    optimizer = build(params, name, "adamw")
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    problem.train(params, optimizer, 1)
    optimizer.zero_grad()
    assert all(x.grad is None for x in params)


@pytest.mark.parametrize("key", ["rho", "alpha"])
def test_rho_and_alpha_can_be_changed_while_training(key):
    """They live in the groups, where a schedule can reach them."""
    paths = []
    for value in (None, 0.0):
        params = problem.parameters()
        optimizer = build(params, "look_sam", "sgd")
        problem.train(params, optimizer, 1)
        if value is not None:
            for group in optimizer.param_groups:
                group[key] = value
        closure = Closure(params, optimizer)
        closure.t = 1
        for _ in range(3):
            closure.step()
        paths.append(copies(params))
    assert not same_bits(*paths)


def test_a_group_added_before_the_first_step_is_as_if_it_had_been_there():
    late, early = problem.parameters(), problem.parameters()
    base = torch.optim.SGD([late[i] for i in GROUPS[0]["layers"]], lr=0.02, momentum=0.9,
                           weight_decay=0.1)  # fmt: skip
    optimizer = LookSAM(base.param_groups[0]["params"], base, rho=0.05, alpha=0.7, k=3)
    optimizer.add_param_group(
        {"params": [late[i] for i in GROUPS[1]["layers"]], "lr": 0.05, "weight_decay": 0.0,
         "rho": 0.1, "alpha": 0.4}
    )  # fmt: skip
    assert len(base.param_groups) == 2
    problem.train(late, optimizer, 8)
    problem.train(early, build(early, "look_sam", "sgd"), 8)
    assert same_bits(late, early)


@pytest.mark.parametrize("name", ["look_sam", "look_layer_sam"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_group_added_between_looks_trains_at_once_and_is_seen_by_the_next_look(name, base):
    params = problem.parameters()
    body = [GROUPS[0] | {"layers": [0, 1, 2, 3]}]
    optimizer = build(params, name, base, groups=body)
    closure = problem.train(params, optimizer, 1)
    closure.step()
    added = [params[SHIFT], params[IDLE]]
    for x in added:
        x.grad = None
    before = copies(added)
    optimizer.add_param_group({"params": added})
    closure.step()
    assert not torch.equal(added[0], before[0])
    closure.step()
    assert closure.t == 4 and all(x.isfinite().all() for x in params)
    assert g_v_of(optimizer, added)[0].abs().sum() > 0


# --- layers without a gradient -------------------------------------------------------------------


def without(*gone):
    groups = [{**g, "layers": [i for i in g["layers"] if i not in gone]} for g in problem.GROUPS]
    kept = [i for i in range(len(problem.SHAPES)) if i not in gone]
    place = {i: n for n, i in enumerate(kept)}
    for group in groups:
        group["layers"] = [place[i] for i in group["layers"]]
    start = problem.start()

    def gradient(weights, t):
        whole = [weights[place[i]] if i in place else start[i] for i in range(len(start))]
        value, g = problem.gradient(whole, t)
        return value, [g[i] for i in kept]

    return [start[i] for i in kept], gradient, groups, kept


@pytest.mark.parametrize("base", ["sgd", "adamw", "lamb", "lars"])
@pytest.mark.parametrize("name", ["sam", "look_sam", "look_layer_sam"])
def test_a_frozen_layer_is_not_there(name, base):
    """No gradient, no decay, no share in any norm: the others go as if it were not listed."""
    start, gradient, groups, kept = without(W1, IDLE)
    truth = reference.train(
        start, gradient, optimizer=name, base=base, steps=8, lr=None, groups=groups, rho=None, k=3
    )
    params = problem.parameters()
    params[W1].requires_grad_(False)
    params[IDLE].requires_grad_(False)
    before = copies(params)
    problem.train(params, build(params, name, base), 8)
    assert torch.equal(params[W1], before[W1]) and torch.equal(params[IDLE], before[IDLE])
    for i, want in zip(kept, truth.weights[-1], strict=True):
        np.testing.assert_allclose(params[i].detach().numpy(), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["sam", "sam_k", "look_sam", "look_layer_sam"])
def test_a_layer_that_is_sometimes_unused_is_left_alone_then(name):
    """torch's rule: where grad is None nothing moves, and nothing here may write a gradient."""

    def loss(weights, t):
        used = list(weights)
        if t % 2:
            used[B1] = weights[B1].detach()
        return problem.loss(used, t)

    params = problem.parameters()
    optimizer = build(params, name, "sgd")
    closure = Closure(params, optimizer, loss=loss)
    for t in range(8):
        before = params[B1].detach().clone()
        closure.step()
        assert torch.equal(params[B1], before) == bool(t % 2), f"step {t}"
        assert all(x.isfinite().all() for x in params)


@pytest.mark.parametrize("name", ["look_sam", "look_layer_sam"])
def test_a_layer_set_free_between_looks_starts_to_train(name):
    params = problem.parameters()
    params[W1].requires_grad_(False)
    optimizer = build(params, name, "adamw")
    closure = problem.train(params, optimizer, 2)
    params[W1].requires_grad_(True)
    before = params[W1].detach().clone()
    closure.step()
    assert not torch.equal(params[W1], before)
    closure.step()
    assert params[W1].isfinite().all() and g_v_of(optimizer, params)[W1].abs().sum() > 0


def test_a_model_with_nothing_to_train_does_not_fall_over():
    params = problem.parameters()
    for x in params[1:]:
        x.requires_grad_(False)
    optimizer = build(params, "look_sam", "sgd")
    closure = Closure(params, optimizer, loss=lambda w, t: problem.loss([x.detach() for x in w], t)
                      + 0.0 * w[W1].sum())  # fmt: skip
    before = copies(params)
    for _ in range(4):
        closure.step()
    assert all(x.isfinite().all() for x in params)
    assert same_bits(params[1:], before[1:])


# --- settings that are wrong ---------------------------------------------------------------------


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


WRONG = [
    ("rho", -0.1, lambda w, b, x: SAM(w, b, rho=x)),
    ("rho", -0.1, lambda w, b, x: LookSAM(w, b, rho=x)),
    ("rho", -0.1, lambda w, b, x: LookLayerSAM(w, b, rho=x)),
    ("rho", float("nan"), lambda w, b, x: SAM(w, b, rho=x)),
    ("rho", -0.1, lambda w, b, x: SAM([{"params": w, "rho": x}], b)),
    ("k", 0, lambda w, b, x: SAM(w, b, k=x)),
    ("k", 0, lambda w, b, x: LookSAM(w, b, k=x)),
    ("k", -1, lambda w, b, x: LookLayerSAM(w, b, k=x)),
    ("p", 1.0, lambda w, b, x: SAM(w, b, p=x)),
    ("p", 0.5, lambda w, b, x: LookSAM(w, b, p=x)),
    ("scope", "tensor", lambda w, b, x: SAM(w, b, scope=x)),
    ("layer_ascent", "printed", lambda w, b, x: SAM(w, b, layer_ascent=x)),
    ("layer_ascent", "printed", lambda w, b, x: LookLayerSAM(w, b, layer_ascent=x)),
    ("decompose", "tensor", lambda w, b, x: LookSAM(w, b, decompose=x)),
    ("decompose", "tensor", lambda w, b, x: LookLayerSAM(w, b, decompose=x)),
    ("reuse", "none", lambda w, b, x: LookSAM(w, b, reuse=x)),
    ("reuse", "none", lambda w, b, x: LookLayerSAM(w, b, reuse=x)),
]


@pytest.mark.parametrize(("what", "got", "make"), WRONG)
def test_a_wrong_setting_is_named_with_its_value_before_any_training(what, got, make):
    params = problem.parameters()
    with pytest.raises(ConfigError) as error:
        make(params, sgd(params), got)
    assert what in str(error.value) and str(got) in str(error.value)


@pytest.mark.parametrize("make", [SAM, LookSAM, LookLayerSAM])
def test_the_base_must_hold_the_same_parameters(make):
    """Too few, too many, or another model's: training would silently leave some where they are."""
    params, others = problem.parameters(), problem.parameters()
    for base in (sgd(params[:-1]), sgd([*params, *others]), sgd(others)):
        with pytest.raises(ConfigError, match="param"):
            make(params, base)


@pytest.mark.parametrize("make", [SAM, LookSAM, LookLayerSAM])
def test_the_base_is_an_instance_and_not_a_class(make):
    """davda54/sam takes a class; who comes from there gets a sentence."""
    with pytest.raises(ConfigError, match="base_optimizer"):
        make(problem.parameters(), torch.optim.SGD)


@pytest.mark.parametrize(("make", "what"), [
    (lambda w: Lamb(w, lr=-1.0), "lr"), (lambda w: Lars(w, lr=-1.0), "lr"),
    (lambda w: Lamb(w, lr=0.1, betas=(1.0, 0.9)), "beta"),
    (lambda w: Lamb(w, lr=0.1, eps=-1.0), "eps"),
    (lambda w: Lamb(w, lr=0.1, weight_decay=-1.0), "weight_decay"),
    (lambda w: Lars(w, lr=0.1, weight_decay=-1.0), "weight_decay"),
    (lambda w: Lars(w, lr=0.1, momentum=-1.0), "momentum"),
])  # fmt: skip
def test_wrong_numbers_of_the_layer_wise_bases_are_named(make, what):
    with pytest.raises(ConfigError, match=what):
        make(problem.parameters())


def test_a_step_without_a_closure_says_what_is_missing():
    params = problem.parameters()
    optimizer = build(params, "look_sam")
    problem.loss(params, 0).backward()
    with pytest.raises((ConfigError, TypeError), match="closure"):
        optimizer.step()


def test_a_layer_keeps_its_dtype_and_16_bits_are_warned_about():
    params = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    optimizer = LookSAM(params, sgd(params), k=2)

    def closure():
        optimizer.zero_grad()
        loss = sum((x.float() ** 2).sum() for x in params)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=r"trained weights must be fp32, got .* in torch.bfloat16"):
        optimizer.step(closure)
    for _ in range(2):
        optimizer.step(closure)
    assert [x.dtype for x in params] == [torch.float32, torch.bfloat16]
    assert all(x.isfinite().all() and (x < 1).all() for x in params)
