"""What must be equal to the last bit, because it is the same thing said in two ways."""

import problem
import pytest
import torch
from build import BASES, build, build_base, copies, same_bits
from problem import GROUPS, Closure

from dist_looksam import SAM, LookLayerSAM, LookSAM

STEPS = 14


def groups_with(**numbers):
    return [group | numbers for group in GROUPS]


def path(name, base="adamw", *, dtype=torch.float32, **how):
    """The weights after every step."""
    params = problem.parameters(dtype)
    closure = Closure(params, build(params, name, base, **how))
    weights = []
    for _ in range(STEPS):
        closure.step()
        weights.append(copies(params))
    return weights


def assert_same_path(ours, theirs):
    for t, (xs, ys) in enumerate(zip(ours, theirs, strict=True)):
        assert same_bits(xs, ys), f"they part at step {t}"


@pytest.mark.parametrize("base", BASES)
def test_look_sam_that_always_looks_is_sam(base):
    assert_same_path(path("look_sam", base, k=1), path("sam", base))


@pytest.mark.parametrize("base", BASES)
def test_look_layer_sam_that_always_looks_is_layer_sam(base):
    assert_same_path(path("look_layer_sam", base, k=1), path("layer_sam", base))


@pytest.mark.parametrize("base", BASES)
def test_sam_k_that_always_looks_is_sam(base):
    assert_same_path(path("sam_k", base, k=1), path("sam", base))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["sam", "sam_k", "layer_sam", "look_sam", "look_layer_sam"])
def test_looking_where_we_stand_is_the_base(name, base):
    """rho = 0: g_s is g to the bit, so nothing is learned and nothing is added.

    For the look_ methods this is sharp: were g_v rounding noise in place of 0, reuse would blow
    it up to alpha ||g||.
    """
    assert_same_path(path(name, base, groups=groups_with(rho=0.0)), path(base, base))


@pytest.mark.parametrize("decompose", ["model", "layer"])
@pytest.mark.parametrize("base", BASES)
def test_reusing_nothing_is_sam_every_k_steps(base, decompose):
    none = groups_with(alpha=0.0)
    ours = path("look_sam", base, groups=none, decompose=decompose)
    assert_same_path(ours, path("sam_k", base))


def test_the_p_norm_of_two_is_the_default():
    for name in ("sam", "look_sam"):
        assert_same_path(path(name, p=2.0), path(name))


@pytest.mark.parametrize("power", [-40, 40])
@pytest.mark.parametrize("name", ["sam", "look_sam", "look_layer_sam"])
def test_the_unit_of_the_loss_does_not_matter(name, power):
    """Loss times 2^n and lr over 2^n, SGD without decay: eps and reuse are relative to g, and
    powers of two round nothing. A small constant added to a norm would show here."""
    paths = []
    for unit in (1.0, 2.0**power):
        groups = [g | {"weight_decay": 0.0, "lr": g["lr"] / unit} for g in GROUPS]
        params = problem.parameters(torch.float32)
        optimizer = build(params, name, "sgd", groups=groups)
        problem.train(params, optimizer, 8, loss=lambda w, t, unit=unit: unit * problem.loss(w, t))
        paths.append(copies(params))
    assert same_bits(*paths)


def awkward(dtype):
    """Weights that w += e; w -= e would not bring back: tiny beside their step, zeros, signs."""
    return [
        torch.nn.Parameter(torch.tensor([1e-8, -0.0, 3.1415927, 1e-30, -7e5], dtype=dtype)),
        torch.nn.Parameter(torch.tensor([[0.1, 0.2], [0.3, -0.7]], dtype=dtype)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [
    lambda w, b: SAM(w, b, rho=1000.0),
    lambda w, b: SAM(w, b, rho=0.3, p=float("inf")),
    lambda w, b: SAM(w, b, rho=3.0, scope="layer"),
    lambda w, b: LookSAM(w, b, rho=1000.0, k=2),
    lambda w, b: LookLayerSAM(w, b, rho=3.0, k=2),
])  # fmt: skip
def test_the_way_up_is_undone_to_the_bit(make, dtype):
    """With a base that does not move, weights after steps are the bits they were before."""
    params = awkward(dtype)
    before = [x.detach().clone().view(torch.uint8) for x in params]
    optimizer = make(params, torch.optim.SGD(params, lr=0.0))
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(copies(params))
        loss = sum((x * x).sum() + x.sum() for x in params)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert not same_bits(seen[0], seen[1]), "the second pass was to be somewhere else"
    assert same_bits([x.detach().view(torch.uint8) for x in params], before)


@pytest.mark.parametrize(("name", "want"), [
    ("sam", [2] * 7), ("layer_sam", [2] * 7), ("sam_k", [2, 1, 1, 2, 1, 1, 2]),
    ("look_sam", [2, 1, 1, 2, 1, 1, 2]), ("look_layer_sam", [2, 1, 1, 2, 1, 1, 2]),
])  # fmt: skip
def test_a_second_gradient_is_paid_for_on_looks_only(name, want):
    params = problem.parameters()
    optimizer = build(params, name, k=3)
    closure = Closure(params, optimizer)
    assert [closure.step() for _ in range(7)] == want
    assert optimizer.steps == 7


@pytest.mark.parametrize("name", ["sam", "look_sam", "look_layer_sam"])
def test_step_returns_the_loss_at_the_weights_and_not_up_the_hill(name):
    params = problem.parameters()
    optimizer = build(params, name)
    closure = Closure(params, optimizer)
    for _ in range(4):
        at_w = problem.loss(params, closure.t).item()
        assert optimizer.step(closure).item() == at_w
        closure.t += 1


def test_lamb_and_lars_take_closures_as_torch_does():
    for base in ("lamb", "lars"):
        params = problem.parameters()
        optimizer = build_base(params, base)
        at_w = problem.loss(params, 0).item()
        assert optimizer.step(Closure(params, optimizer)).item() == at_w
        assert optimizer.step() is None
