"""Mistakes that LookSAM and SAM codes have made. Each test tells one and would catch it.

Those that a code in use still makes are in test_peers_still_there.py. Sharded ranks, where local
norms are the mistake, are tested with the backends.
"""

import contextlib
import io

import numpy as np
import problem
import pytest
import torch
from build import bowl, build, copies, g_v_of, parameters, same_bits
from problem import GROUPS, W1, Closure

from dist_looksam import SAM, LookLayerSAM, LookSAM

# --- earlier pytorch_optimizer (4.1.0 has mended these) ------------------------------------------


def test_a_reuse_step_gives_the_base_g_once():
    """pytorch_optimizer's reuse steps got 2g: two backwards had added up in .grad. With alpha 0
    and SGD at lr 1, what a step takes off the weights is what the base got."""
    params = parameters([1.0, -2.0])
    optimizer = LookSAM(params, torch.optim.SGD(params, lr=1.0), k=2, alpha=0.0)
    closure = Closure(params, optimizer, loss=lambda w, t: bowl(w, [0.25]))
    closure.step()
    before = params[0].detach().clone()
    closure.step()
    assert torch.equal(before - params[0].detach(), 0.25 * before)


ANY_BASE = {
    "SGD": lambda w: torch.optim.SGD(w, lr=0.01),
    "SGD momentum": lambda w: torch.optim.SGD(w, lr=0.01, momentum=0.9),
    "SGD nesterov": lambda w: torch.optim.SGD(w, lr=0.01, momentum=0.9, nesterov=True),
    "SGD foreach": lambda w: torch.optim.SGD(w, lr=0.01, momentum=0.9, foreach=True),
    "Adam": lambda w: torch.optim.Adam(w, lr=0.01),
    "Adam amsgrad": lambda w: torch.optim.Adam(w, lr=0.01, amsgrad=True),
    "AdamW foreach": lambda w: torch.optim.AdamW(w, lr=0.01, foreach=True),
    "AdamW fused": lambda w: torch.optim.AdamW(w, lr=0.01, fused=True),
    "NAdam": lambda w: torch.optim.NAdam(w, lr=0.01),
    "RAdam": lambda w: torch.optim.RAdam(w, lr=0.01),
    "Adamax": lambda w: torch.optim.Adamax(w, lr=0.01),
    "Adagrad": lambda w: torch.optim.Adagrad(w, lr=0.01),
    "Adadelta": lambda w: torch.optim.Adadelta(w, lr=0.01),
    "RMSprop": lambda w: torch.optim.RMSprop(w, lr=0.01, momentum=0.9),
    "Rprop": lambda w: torch.optim.Rprop(w, lr=0.01),
    "ASGD": lambda w: torch.optim.ASGD(w, lr=0.01),
}


@pytest.mark.parametrize("bad", [[], [(0, 2)]], ids=["", "first look skipped"])
@pytest.mark.parametrize("base", ANY_BASE.values(), ids=ANY_BASE)
def test_any_base_of_torch_will_do(base, bad):
    """pytorch_optimizer raised KeyError with SGD+momentum: it asked the base's state for a step
    that SGD does not keep. The other way about, a g_v put into a state that the base still has to
    fill makes Adam believe it is filled; a first look that is skipped is where that shows."""
    params = problem.parameters()
    optimizer = LookSAM(params, base(params), k=2)
    closure = problem.train(params, optimizer, 5, bad=bad)
    assert closure.calls == (9 if bad else 8)
    assert all(x.isfinite().all() for x in params)
    assert all(x.abs().sum() > 0 for x in g_v_of(optimizer, params)[:4])
    state = optimizer.state_dict()
    again = problem.parameters()
    other = LookSAM(again, base(again), k=2)
    other.load_state_dict(state)
    Closure(again, other).step()


def test_g_v_stays_between_looks_when_the_base_keeps_no_state():
    """pytorch_optimizer counted steps in the base's state; plain SGD has none, so every step was
    step 0 and g_v was taken anew each time."""
    params = problem.parameters()
    optimizer = LookSAM(params, torch.optim.SGD(params, lr=0.1), k=3)
    closure, seen = Closure(params, optimizer), []
    for _ in range(4):
        closure.step()
        seen.append([x.clone() for x in g_v_of(optimizer, params)])
    assert same_bits(seen[0], seen[1]) and same_bits(seen[1], seen[2])
    assert not same_bits(seen[2], seen[3])


def test_state_dict_holds_the_state_of_the_base():
    """pytorch_optimizer and davda54/sam saved the wrapper's state alone: after a resume Adam's
    moments began at zero, seen as a spike in the loss."""
    params = problem.parameters()
    for make in (SAM, LookSAM, LookLayerSAM):
        optimizer = make(params, torch.optim.AdamW(params))
        problem.train(params, optimizer, 2)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again = problem.parameters()
        other = make(again, torch.optim.AdamW(again))
        other.load_state_dict(torch.load(file, weights_only=True))
        for x, y in zip(params, again, strict=True):
            for name in ("step", "exp_avg", "exp_avg_sq"):
                one, two = (
                    o.base_optimizer.state[p][name] for o, p in ((optimizer, x), (other, y))
                )
                assert torch.equal(one, two)
            assert y not in optimizer.state


@pytest.mark.parametrize("name", ["sam", "sam_k", "look_sam", "layer_sam", "look_layer_sam"])
@pytest.mark.parametrize("base", ["sgd", "adamw", "lamb", "lars"])
def test_a_zero_gradient_is_not_divided_by(name, base):
    """pytorch_optimizer: g/||g|| = 0/0, and all weights NaN. Here on looks and on reuse steps."""
    params = problem.parameters()
    optimizer = build(params, name, base)
    closure = Closure(params, optimizer, loss=lambda w, t: 0.0 * problem.loss(w, 0))
    for _ in range(5):
        closure.step()
    assert all(x.isfinite().all() for x in params)


def test_layers_of_many_groups_do_not_share_a_g_v():
    """pytorch_optimizer's keys gv_{group}{layer} met: (1, 10) and (11, 0) were both gv_110. Twelve
    groups of eleven: every g_v is the one that one group of all gives."""
    numbers = torch.Generator().manual_seed(0)
    start = [torch.randn(2, dtype=torch.float64, generator=numbers) for _ in range(12 * 11)]
    curvatures = [torch.rand(2, dtype=torch.float64, generator=numbers) for _ in start]
    g_v = []
    for grouped in (True, False):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        groups = [{"params": params[i : i + 11]} for i in range(0, len(params), 11)]
        base = torch.optim.SGD(groups if grouped else params, lr=0.1)
        optimizer = LookSAM(params, base)
        Closure(params, optimizer, loss=lambda w, t: bowl(w, curvatures)).step()
        g_v.append(g_v_of(optimizer, params))
    assert len({x.data_ptr() for x in g_v[0]}) == len(start)
    assert same_bits(*g_v)


# --- rollovd/LookSAM -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_resume_between_looks_finds_its_g_v(steps):
    """rollovd/LookSAM raises KeyError when it goes on at t mod k != 0: g_v was not saved."""
    params = problem.parameters()
    closure = problem.train(params, build(params, "look_sam", "sgd"), steps)
    weights, state = copies(params), closure.optimizer.state_dict()
    again = [torch.nn.Parameter(w) for w in weights]
    optimizer = build(again, "look_sam", "sgd")
    optimizer.load_state_dict(state)
    assert same_bits(g_v_of(optimizer, again), g_v_of(closure.optimizer, params))
    on = Closure(again, optimizer)
    on.t = steps
    assert on.step() == 1


def test_a_resume_without_a_g_v_looks_first():
    """The same, from a file that has none, as one saved by SAM: no KeyError, and no plain steps
    until the next multiple of k either."""
    params = problem.parameters()
    state = problem.train(params, build(params, "sam_k", "adamw"), 4).optimizer.state_dict()
    optimizer = build(params, "look_sam", "adamw")
    optimizer.load_state_dict(state)
    closure = Closure(params, optimizer)
    closure.t = 4
    assert [closure.step() for _ in range(3)] == [2, 1, 2]


def test_every_group_is_perturbed_and_learns():
    """rollovd/LookSAM perturbs and updates the first group alone; so do its many copies."""
    params = problem.parameters()
    optimizer = build(params, "look_sam", "sgd")
    visited = []

    def loss(weights, t):
        visited.append(copies(weights))
        return problem.loss(weights, t)

    Closure(params, optimizer, loss=loss).step()
    for group in GROUPS:
        moved = [i for i in group["layers"] if not torch.equal(visited[0][i], visited[1][i])]
        assert len(moved) >= 2
        assert all(g_v_of(optimizer, params)[i].abs().sum() > 0 for i in moved)


@pytest.mark.parametrize("name", ["sam", "look_sam", "look_layer_sam"])
def test_gradients_can_be_accumulated(name):
    """rollovd/LookSAM owns model and loss, davda54/sam takes one backward: neither can add up
    micro-batches (issues 55, 62). Here the closure runs as many backwards as it likes."""
    whole, parts = problem.parameters(), problem.parameters()
    problem.train(whole, build(whole, name, "adamw"), 7)
    optimizer = build(parts, name, "adamw")
    for t in range(7):

        def closure(t=t):
            optimizer.zero_grad()
            total = 0.0
            for _ in range(4):
                value = problem.loss(parts, t) / 4
                value.backward()
                total += value.detach()
            return total

        optimizer.step(closure)
    for x, y in zip(whole, parts, strict=True):
        np.testing.assert_allclose(y.detach().numpy(), x.detach().numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("inside", [True, False], ids=["in the closure", "around the step"])
def test_autocast_sees_the_weights_up_the_hill(inside):
    """What users of SAM with AMP meet: autocast remembers 16-bit copies of weights until its block
    ends. With the block around the whole step, the second pass would compute at the old weights
    and g_v would be 0."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    params = list(model.parameters())
    optimizer = LookSAM(params, torch.optim.SGD(params, lr=0.1), rho=1.0)
    x = torch.randn(16, 8)

    def half():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def closure():
        optimizer.zero_grad()
        with half() if inside else contextlib.nullcontext():
            loss = model(x).float().pow(2).sum()
        loss.backward()
        return loss

    with contextlib.nullcontext() if inside else half():
        optimizer.step(closure)
    sizes = [float(v.norm() / (p.grad.norm() + 1e-9)) for v, p in
             zip(g_v_of(optimizer, params), params, strict=True)]  # fmt: skip
    assert max(sizes) > 0.05
    assert all(x.dtype == torch.float32 for x in params)


# --- other LookSAMs ------------------------------------------------------------------------------


def test_the_first_look_remembers_gradients_and_not_weights():
    """Leminhbinh0209/LookSAM stores w where g belongs at the first look. At w = (1, 1), g = (3, 4)
    the true g_v is (-.192, .144); with w for g it would be (-.85, .85)."""
    params = parameters([1.0, 1.0])
    optimizer = LookSAM(params, torch.optim.SGD(params, lr=0.1), rho=0.5)
    Closure(params, optimizer, loss=lambda w, t: bowl(w, [torch.tensor([3.0, 4.0])])).step()
    np.testing.assert_allclose(g_v_of(optimizer, params)[0].numpy(), [-0.192, 0.144], rtol=1e-9)


def test_the_layer_wise_perturbation_is_relative_to_every_layer():
    """EnderDragonzy/looksam_wise_layer is not layer-wise: one norm for all. Here each layer moves
    by rho ||w_i||, however different the sizes of its weights and gradients are."""
    params = parameters([3.0, 4.0], [3e-3, -4e-3, 0.0], [1e3])
    optimizer = LookLayerSAM(params, torch.optim.SGD(params, lr=0.0), rho=0.1)
    visited = []

    def loss(weights, t):
        visited.append(copies(weights))
        return bowl(weights, [1e-4, 1.0, 1e4])

    Closure(params, optimizer, loss=loss).step()
    for w, up in zip(*visited, strict=True):
        assert float((up - w).norm() / w.norm()) == pytest.approx(0.1, rel=1e-9)


@pytest.mark.parametrize("make", [SAM, LookSAM, LookLayerSAM])
def test_from_the_first_step_on_the_perturbation_is_undone(make):
    """EnderDragonzy/looksam_wise_layer leaves the first perturbation in the weights; Composer
    takes it off with sub_, which gives other bits. lr = 0, so nothing else moves them."""
    params = problem.parameters(torch.float32)
    before = copies(params)
    problem.train(params, make(params, torch.optim.SGD(params, lr=0.0), rho=7.0), 3)
    assert same_bits(params, before)


@pytest.mark.parametrize("name", ["look_sam", "look_layer_sam"])
def test_reuse_steps_do_use_g_v(name):
    """THUDM/INFTY writes g_v under one key and reads another: it is never there, and what runs is
    plain training between looks. Here alpha is seen in the very first reuse step."""
    weights = []
    for alpha in (0.0, 0.7):
        params = problem.parameters()
        groups = [group | {"alpha": alpha} for group in GROUPS]
        problem.train(params, build(params, name, "sgd", groups=groups), 2)
        weights.append(params[W1].detach())
    assert not torch.allclose(*weights)


@pytest.mark.parametrize("key", ["rho", "alpha"])
def test_every_group_has_its_own_numbers(key):
    """A fork of physicsnemo takes rho and alpha of group 0 for all."""
    weights = []
    for value in (0.0, 0.9):
        params = problem.parameters()
        problem.train(params, build(params, "look_sam", "sgd",
                                    groups=[GROUPS[0], GROUPS[1] | {key: value}]), 2)  # fmt: skip
        weights.append(params[GROUPS[1]["layers"][0]].detach())
    assert not torch.allclose(*weights)
