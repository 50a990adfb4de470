"""Two passes that look like one: the same random numbers, BatchNorm as after one, no half steps."""

import copy

import problem
import pytest
import torch
from build import build, copies, g_v_of, same_bits
from problem import W2, Closure

from dist_looksam import SAM, LookLayerSAM, LookSAM

MAKERS = {
    "sam": lambda params, base, **how: SAM(params, base, **how),
    "layer_sam": lambda params, base, **how: SAM(params, base, scope="layer", **how),
    "look_sam": lambda params, base, **how: LookSAM(params, base, k=2, **how),
    "look_layer_sam": lambda params, base, **how: LookLayerSAM(params, base, k=2, **how),
}
each_method = pytest.mark.parametrize("name", list(MAKERS))


def of(name, net, **how):
    params = list(net.parameters())
    return MAKERS[name](params, torch.optim.SGD(params, lr=0.1, momentum=0.9), rho=0.05, **how)


def net(*layers):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), *layers, torch.nn.Linear(8, 2))


def closure_for(model, optimizer, x, watch=lambda: None):
    def closure():
        optimizer.zero_grad()
        loss = (model(x) ** 2).mean()
        watch()
        loss.backward()
        return loss

    return closure


# --- random numbers ------------------------------------------------------------------------------


@each_method
def test_both_passes_see_the_same_random_numbers_and_the_next_step_sees_others(name):
    model = net()
    optimizer = of(name, model)
    drawn = []

    def closure():
        optimizer.zero_grad()
        drawn.append(torch.rand(6))
        loss = (model(torch.ones(3, 4)) * drawn[-1].view(3, 2)).sum()
        loss.backward()
        return loss

    steps = []
    for _ in range(4):
        optimizer.step(closure)
        steps.append(drawn.copy())
        drawn.clear()
    assert len(steps[0]) == 2
    for passes in steps:
        assert all(torch.equal(x, passes[0]) for x in passes)
    assert not any(torch.equal(steps[0][0], later[0]) for later in steps[1:])


@each_method
def test_random_numbers_go_on_as_after_one_pass(name):
    """So a run draws the same numbers, and the same samples, with every method and every k."""
    model, plain = net(torch.nn.Dropout(0.5)), net(torch.nn.Dropout(0.5))
    x = torch.ones(3, 4)
    optimizer = of(name, model)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    torch.manual_seed(7)
    for _ in range(4):
        sgd.step(closure_for(plain, sgd, x))
    want = torch.rand(5)
    torch.manual_seed(7)
    for _ in range(4):
        optimizer.step(closure_for(model, optimizer, x))
    assert torch.equal(torch.rand(5), want)


@pytest.mark.parametrize("broken", [1, 2])
def test_a_skipped_step_still_uses_up_the_numbers_of_one_pass(broken):
    params = problem.parameters()
    optimizer = build(params, "look_sam")

    def loss(weights, t):
        return problem.loss(weights, t) + 0.0 * torch.rand(3, dtype=torch.float64).sum()

    torch.manual_seed(7)
    torch.rand(3, dtype=torch.float64)
    want = torch.rand(5)
    torch.manual_seed(7)
    problem.train(params, optimizer, 1, bad=[(0, broken)], loss=loss)
    assert torch.equal(torch.rand(5), want)


def test_with_dropout_g_v_is_of_one_network_and_not_of_two():
    """rho = 0 and dropout: the passes differ in nothing, so g_v is 0 to the bit."""
    model = net(torch.nn.Dropout(0.5))
    params = list(model.parameters())
    optimizer = LookSAM(params, torch.optim.SGD(params, lr=0.1), rho=0.0)
    optimizer.step(closure_for(model, optimizer, torch.ones(3, 4)))
    assert all((v == 0).all() for v in g_v_of(optimizer, params))


# --- BatchNorm -----------------------------------------------------------------------------------


def buffers(model):
    return [x.clone() for x in model.buffers()]


@each_method
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_statistics_are_those_of_one_pass(name, momentum):
    """Of the pass at w, and counted once; with momentum None the count is part of the average."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    model = net(torch.nn.BatchNorm1d(8, momentum=momentum))
    optimizer = of(name, model, model=model)
    for _ in range(4):
        once = copy.deepcopy(model)
        once(x)
        optimizer.step(closure_for(model, optimizer, x))
        assert same_bits(buffers(model), buffers(once))


@each_method
def test_the_pass_up_the_hill_still_normalises_by_its_own_batch(name):
    """Keeping the statistics must not put the net in eval mode: the weights are as without it."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    kept, free = net(torch.nn.BatchNorm1d(8)), net(torch.nn.BatchNorm1d(8))
    for model, how in ((kept, {"model": kept}), (free, {})):
        optimizer = of(name, model, **how)
        for _ in range(4):
            optimizer.step(closure_for(model, optimizer, x))
    assert same_bits(kept.parameters(), free.parameters())
    assert not same_bits(buffers(kept), buffers(free))


@each_method
def test_batch_norm_is_given_back_as_it_was_set(name):
    """momentum, training and track_running_stats, also of a layer the user has frozen."""
    model = net(torch.nn.BatchNorm1d(8, momentum=0.3), torch.nn.BatchNorm1d(8, momentum=None))
    model[1].eval()
    optimizer = of(name, model, model=model)
    frozen = [x.clone() for x in model[1].buffers()]
    optimizer.step(closure_for(model, optimizer, torch.randn(16, 4)))
    got = [(m.momentum, m.training, m.track_running_stats) for m in (model[1], model[2])]
    assert got == [(0.3, False, True), (None, True, True)]
    assert same_bits(model[1].buffers(), frozen)
    model(torch.randn(16, 4))
    assert int(model[2].num_batches_tracked) == 2


@pytest.mark.parametrize("name", ["sam", "look_sam", "look_layer_sam"])
def test_gradients_zeroed_in_place_are_the_same_as_gradients_let_go(name):
    """With set_to_none=False the second pass writes where the first gradient lies: who kept no
    copy of g finds g_s in its place, and g_v is 0."""
    ways = []
    for set_to_none in (True, False):
        params = problem.parameters()
        optimizer = build(params, name)

        def closure(t, params=params, optimizer=optimizer, set_to_none=set_to_none):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = problem.loss(params, t)
            loss.backward()
            return loss

        for t in range(5):
            optimizer.step(lambda t=t, closure=closure: closure(t))
        ways.append(copies(params))
    assert same_bits(*ways)


# --- what breaks in the middle --------------------------------------------------------------------


def snapshot(params, optimizer):
    return copy.deepcopy(
        [
            [x.detach() for x in params],
            optimizer.base_optimizer.state_dict(),
            [dict(optimizer.state[x]) for x in params],
        ]
    )


def equal(a, b) -> bool:
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[x], b[x]) for x in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", [(3, 1), (3, 2), (4, 1)])
@pytest.mark.parametrize("base", ["sgd", "adamw", "lamb", "lars"])
@pytest.mark.parametrize("name", ["sam", "sam_k", "look_sam", "look_layer_sam"])
def test_a_skipped_step_leaves_weights_and_state_to_the_bit(name, base, bad, spoil):
    params = problem.parameters()
    optimizer = build(params, name, base)
    closure = Closure(params, optimizer, bad=[bad], spoil=spoil)
    for _ in range(bad[0]):
        closure.step()
    before = snapshot(params, optimizer)
    closure.step()
    assert equal(snapshot(params, optimizer), before)
    assert optimizer.steps == bad[0] + 1
    closure.step()
    assert all(x.isfinite().all() for x in params)
    assert not same_bits(params, before[0])


@pytest.mark.parametrize("broken", [1, 2])
def test_a_skipped_step_leaves_batch_norm_as_it_was(broken):
    """Its statistics are state too, and an overflow in the forward would be in them for good."""
    model = net(torch.nn.BatchNorm1d(8))
    optimizer = of("look_sam", model, model=model)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    optimizer.step(closure_for(model, optimizer, x))
    optimizer.step(closure_for(model, optimizer, x))
    before, passes, sound = buffers(model), [], closure_for(model, optimizer, x)

    def spoilt():
        passes.append(1)
        loss = sound()
        if len(passes) == broken:
            model[0].weight.grad[0, 0] = float("inf")
        return loss

    optimizer.step(spoilt)
    assert not bool(optimizer.seen.finite)
    assert same_bits(buffers(model), before)


def test_an_error_up_the_hill_does_not_leave_the_weights_there():
    """Ctrl-C or a lost rank in the second pass: what is saved on the way out must be w."""
    model = net(torch.nn.BatchNorm1d(8))
    params = list(model.parameters())
    optimizer = of("look_sam", model, model=model)
    before = copies(params)
    calls = []

    def stumble():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_for(model, optimizer, torch.randn(16, 4), stumble))
    assert len(calls) == 2
    assert same_bits(params, before)
    assert model[1].momentum == 0.1


def test_the_closure_may_run_under_no_grad_outside():
    params = problem.parameters()
    optimizer = build(params, "look_sam")
    before = copies(params)
    with torch.no_grad():
        problem.train(params, optimizer, 2)
    assert not torch.equal(params[W2], before[W2])


def test_a_parameter_that_the_second_pass_alone_uses_is_counted():
    """As where the weights choose the branch. It got its whole gradient, which neither the norms
    nor the clipping knew of."""
    a, b = (torch.nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (1.0, 1.0))
    optimizer = LookSAM([a, b], torch.optim.SGD([a, b], lr=1.0), rho=0.1)
    optimizer.clip = 1.0
    passes = []

    def closure():
        optimizer.zero_grad()
        passes.append(1)
        loss = (3.0 * a + (4.0 * b if len(passes) == 2 else 0.0)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(optimizer.seen.update_norm) == pytest.approx(1.0)
    torch.testing.assert_close(torch.cat([a, b]), 1 - torch.tensor([3.0, 4.0]).double() / 5)
    assert float(optimizer.state[b]["g_v"]) == pytest.approx(4.0)
