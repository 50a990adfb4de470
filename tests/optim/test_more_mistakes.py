"""What a closure, a group or a caller of `step` gets wrong is refused, or cannot go wrong."""

import copy
import pickle

import pytest
import small
import torch
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

from dist_looksam import SAM, ConfigError, Lamb, Lars, LookSAM

SGD = torch.optim.SGD


def closure_of(model, optimizer, scale=lambda loss: loss):
    x, y = small.batch(0)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        scale(loss).backward()
        return loss

    return closure


def made(rule=LookSAM, lr=0.1, **how):
    model = small.net()
    return model, rule(model.parameters(), SGD(model.parameters(), lr=lr), **how)


def moved(model, act):
    before = [p.detach().clone() for p in model.parameters()]
    act()
    return max(float((p - b).abs().max()) for p, b in zip(model.parameters(), before, strict=True))


def test_a_copy_of_a_scheduled_optimizer_steps_itself():
    """torch's schedulers put a wrapper of `step` on the optimizer, which holds the optimizer. A
    deep copy took it along and so stepped the original, whose gradients are not there: the copy did
    not move, without a word. Pickling raised PicklingError."""
    model, optimizer = made(k=2)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    other, twin = copy.deepcopy((model, optimizer))
    alone = moved(model, lambda: optimizer.step(closure_of(model, optimizer)))
    assert moved(other, lambda: twin.step(closure_of(other, twin))) == alone > 0
    assert pickle.loads(pickle.dumps(optimizer)).steps == 1


def test_a_copy_takes_no_hooks_along():
    """As torch copies optimizers; a hook that is a local function could not be pickled."""
    model, optimizer = made()
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("step"))
    other, twin = copy.deepcopy((model, optimizer))
    twin.step(closure_of(other, twin))
    assert not calls
    optimizer.step(closure_of(model, optimizer))
    assert calls == ["step"]
    pickle.dumps(optimizer)


def test_a_base_that_maximises_is_refused():
    """maximize=True: g points to what is better, w + eps was the better point, and the weights were
    .012 from those of the same loss, negated. Between looks, too."""
    model = small.net()
    params = list(model.parameters())
    groups = [{"params": params[:2]}, {"params": params[2:], "maximize": True}]
    for given in (groups, [{"params": params, "maximize": True}]):
        with pytest.raises(ConfigError, match="must minimise"):
            LookSAM(params, SGD(given, lr=0.1))
    model, optimizer = made()
    with pytest.raises(ConfigError, match="must minimise"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "maximize": True})


def test_a_parameter_that_the_first_pass_alone_uses_is_counted():
    """Its g_s is zero. It was left out of ||g|| and g_v instead, so that all other layers' g_v were
    wrong (zero here, where the truth is 4.5) and its own was not there."""
    a, b = (Parameter(torch.tensor(v, dtype=torch.float64)) for v in ([1.0, 2.0], [3.0, -1.0]))
    optimizer = LookSAM([a, b], SGD([a, b], lr=0.1), rho=0.5, k=2)
    passes = []

    def closure():
        optimizer.zero_grad()
        loss = (a**2).sum() + ((b**4).sum() if not passes else 0.0)
        loss.backward()
        passes.append(loss)
        return loss

    start = [p.detach().clone() for p in (a, b)]
    optimizer.step(closure)
    g = torch.cat([2 * start[0], 4 * start[1] ** 3])
    up = start[0] + 0.5 * g[:2] / g.norm()
    g_s = torch.cat([2 * up, torch.zeros(2, dtype=torch.float64)])
    g_v = g_s - (g_s @ g) / (g @ g) * g
    got = torch.cat([optimizer.state[p]["g_v"] for p in (a, b)])
    torch.testing.assert_close(got, g_v, rtol=1e-12, atol=0)
    torch.testing.assert_close(a.detach(), start[0] - 0.1 * g_s[:2], rtol=1e-12, atol=0)
    assert torch.equal(b.detach(), start[1])


def test_a_parameter_frozen_between_the_passes_does_not_move():
    model, optimizer = made(k=2)
    frozen, calls = model[0].weight, []
    inner = closure_of(model, optimizer)

    def closure():
        frozen.requires_grad_(not calls)
        calls.append(1)
        return inner()

    before = frozen.detach().clone()
    optimizer.step(closure)
    assert len(calls) == 2 and torch.equal(frozen.detach(), before)


def test_a_closure_without_backward_is_refused():
    """Nothing moved, and nothing was told."""
    model, optimizer = made()
    x, y = small.batch(0)
    with pytest.raises(ConfigError, match="must call backward"):
        optimizer.step(lambda: cross_entropy(model(x), y))
    assert optimizer.steps == 0


def test_a_loss_in_place_of_a_closure_is_refused():
    model, optimizer = made()
    x, y = small.batch(0)
    with pytest.raises(ConfigError, match="got a Tensor; pass the function"):
        optimizer.step(cross_entropy(model(x), y))


def test_a_step_by_grad_scaler_is_refused_and_by_a_disabled_one_taken():
    """GradScaler.step refuses closure=..., and takes a closure that is not named: the base got 1024
    times the gradient. accelerate calls it so in fp16."""
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    closure = closure_of(model, optimizer, scaler.scale)
    closure()

    def step():
        with pytest.raises(ConfigError, match="must get gradients that are not scaled"):
            scaler.step(optimizer, closure)

    assert moved(model, step) == 0
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert 0 < moved(model, lambda: off.step(optimizer, closure_of(model, optimizer))) < 0.1


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", None, [0.1]], ids=str)
@pytest.mark.parametrize("name", ["rho", "alpha"])
def test_rho_and_alpha_are_checked_whenever_they_are_used(name, value):
    """Text was a TypeError. A value that a caller or a schedule put into a group was taken: -1 went
    down in place of up, with nan every step was skipped, both without a word."""
    with pytest.raises(ConfigError, match=f"{name} must be"):
        made(**{name: value})
    model, optimizer = made(k=2)
    if name == "alpha":
        optimizer.step(closure_of(model, optimizer))
    optimizer.param_groups[0][name] = value

    def step():
        with pytest.raises(ConfigError, match=f"{name} must be"):
            optimizer.step(closure_of(model, optimizer))

    assert moved(model, step) == 0
    optimizer.param_groups[0][name] = torch.tensor(0.1)
    assert moved(model, lambda: optimizer.step(closure_of(model, optimizer))) > 0


@pytest.mark.parametrize(
    ("make", "how", "says"),
    [
        (SAM, {"p": "2"}, "p must be a number, got '2'"),
        (Lamb, {"lr": "1"}, "lr must be a number"),
        (Lamb, {"betas": 0.9}, "betas must be two numbers"),
        (Lamb, {"betas": (0.9,)}, "betas must be two numbers"),
        (Lamb, {"eps": None}, "eps must be a number"),
        (Lamb, {"eps": float("inf")}, "eps must be >= 0 and finite"),
        (Lars, {"momentum": "x"}, "momentum must be a number"),
        (Lars, {"weight_decay": None}, "weight_decay must be a number"),
    ],
    ids=str,
)
def test_what_is_no_number_is_a_sentence(make, how, says):
    params = list(small.net().parameters())
    given = (params, SGD(params, lr=0.1)) if make is SAM else (params,)
    with pytest.raises(ConfigError, match=says):
        make(*given, **how)


@pytest.mark.parametrize("make", [Lamb, Lars])
def test_sparse_gradients_are_refused_by_the_layer_wise_bases(make):
    table = torch.nn.Embedding(5, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match="must be dense"):
        make(table.parameters()).step()


@pytest.mark.parametrize("given", [{}, {"weight": torch.ones(2)}])
def test_a_state_dict_of_something_else_is_a_sentence(given):
    with pytest.raises(ConfigError, match="state_dict must be an optimizer's"):
        made()[1].load_state_dict(given)


def test_a_base_in_the_place_of_params_does_not_print_all_weights():
    params = list(small.net().parameters())
    with pytest.raises(ConfigError, match="got a list; make it over the same"):
        SAM(SGD(params, lr=0.1), params)
