"""Engine's second pass: same random numbers, BatchNorm as after one pass, whole steps or none."""

import copy
import itertools

import pytest
import small
import torch
from torch import nn

from dist_looksam import Engine, LookSAM
from dist_looksam.optim.table import METHODS

SHARP = [n for n, row in METHODS.items() if row.two_passes]
each_method = pytest.mark.parametrize("name", SHARP)
F32 = torch.float32


def tensors(thing) -> list[torch.Tensor]:
    """Every tensor in a state_dict or a module, in order."""
    if isinstance(thing, torch.Tensor):
        return [thing.detach().clone()]
    if isinstance(thing, dict):
        return list(itertools.chain.from_iterable(tensors(v) for v in thing.values()))
    if isinstance(thing, list | tuple):
        return list(itertools.chain.from_iterable(tensors(v) for v in thing))
    return []


def everything(engine) -> list[torch.Tensor]:
    """Weights, buffers, and the state of the base optimizer with g_v in it."""
    base = engine.optimizer.base_optimizer
    return tensors(engine.module.state_dict()) + tensors(base.state_dict())


def same(xs, ys) -> bool:
    return len(xs) == len(ys) and all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


class Spoilt:
    """small.loss, which becomes infinite on the given passes; a pass is one whole global batch."""

    def __init__(self, *bad: int, accumulation: int = 1) -> None:
        self.bad, self.accumulation, self.calls = bad, accumulation, 0

    def __call__(self, model, pair):
        number = self.calls // self.accumulation
        self.calls += 1
        value = small.loss(model, pair)
        return value * float("inf") if number in self.bad else value


# --- random numbers ------------------------------------------------------------------------------


@each_method
def test_both_passes_draw_the_same_dropout_over_all_micro_batches(name):
    drawn = []

    def loss(model, pair):
        drawn.append(torch.rand(5))
        return small.loss(model, pair)

    engine = small.engine(small.net(), name, k=2, loss=loss)
    for t in range(4):
        drawn.clear()
        done = engine.step(small.micro_batches(t, accumulation=3))
        assert len(drawn) == (6 if done.look else 3)
        assert same(drawn[:3], drawn[3:]) or not done.look
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn[:3], 2))


@each_method
def test_random_numbers_go_on_as_after_one_pass(name):
    def after(kind):
        engine = small.engine(small.net(nn.Dropout(0.5)), kind)
        torch.manual_seed(7)
        for t in range(4):
            engine.step(small.micro_batches(t, accumulation=2))
        return torch.rand(5)

    assert torch.equal(after(name), after("sgd"))


@pytest.mark.parametrize("name", ["look_sam", "look_layer_sam"])
def test_with_dropout_g_v_is_of_one_network(name):
    """rho = 0: the passes differ in nothing but the dropout, so g_v must be 0 to rounding."""
    model = small.net(nn.Dropout(0.5))
    engine = small.engine(model, name)
    for group in engine.optimizer.param_groups:
        group["rho"] = 0.0
    done = engine.step(small.micro_batches(0, accumulation=3))
    assert float(done.seen.gv_ratio) < 1e-12


# --- BatchNorm -----------------------------------------------------------------------------------


@each_method
def test_batch_norm_statistics_are_those_of_one_pass(name):
    model = small.net(nn.BatchNorm1d(small.HIDDEN))
    engine = small.engine(model, name)
    for t in range(4):
        once = copy.deepcopy(model)
        for x, _ in small.micro_batches(t, accumulation=2):
            once(x)
        engine.step(small.micro_batches(t, accumulation=2))
        assert same(tensors(list(model.buffers())), tensors(list(once.buffers())))


@pytest.mark.parametrize("bad", [0, 1])
def test_a_skipped_step_leaves_batch_norm_as_it_was(bad):
    """bad 0: the pass at w; 1: the pass at w + eps."""
    model = small.net(nn.BatchNorm1d(small.HIDDEN))
    engine = small.engine(model, "look_sam", loss=Spoilt(bad))
    before = everything(engine)
    done = engine.step(small.micro_batches(0))
    assert not bool(done.seen.finite)
    assert same(tensors(engine.module.state_dict()), before[: len(model.state_dict())])


# --- overflow ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [5, 6], ids=["pass_1", "pass_2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name, base", [
    ("look_sam", "adamw"), ("look_sam", "sgd"), ("look_layer_sam", "lamb"), ("sam_k", "lars"),
])  # fmt: skip
def test_an_overflow_in_either_pass_costs_the_step_and_nothing_else(name, base, precision, bad):
    """k = 4: step 0 is passes 0 and 1, steps 1 to 3 passes 2 to 4, step 4 looks with 5 and 6."""
    loss = Spoilt(bad)
    engine = small.engine(small.net(dtype=F32), name, base, k=4, loss=loss, precision=precision)
    scaler = engine.backend.scaler
    for t in range(4):
        assert bool(engine.step(small.micro_batches(t, dtype=F32)).seen.finite)
    before, passes = everything(engine), engine.passes
    scale = scaler.scale if scaler else None
    done = engine.step(small.micro_batches(4, dtype=F32))
    assert done.look and not bool(done.seen.finite)
    assert same(everything(engine), before)
    if scaler:
        assert scaler.scale == scale / 2
    if bad == 5 and scaler:
        assert engine.passes == passes + 1  # known at once, so the second pass was spared
    loss.bad = ()
    again = engine.step(small.micro_batches(5, dtype=F32))
    assert again.look, "the look that was skipped must be repeated"
    assert bool(again.seen.finite) and not same(everything(engine), before)
    assert not engine.step(small.micro_batches(6, dtype=F32)).look
    assert all(torch.isfinite(x).all() for x in everything(engine))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_overflow_between_looks_costs_the_step_and_owes_no_look(precision):
    loss = Spoilt(2)
    engine = small.engine(small.net(dtype=F32), "look_sam", k=4, loss=loss, precision=precision)
    engine.step(small.micro_batches(0, dtype=F32))
    before = everything(engine)
    done = engine.step(small.micro_batches(1, dtype=F32))
    assert not done.look and not bool(done.seen.finite)
    assert same(everything(engine), before)
    assert not engine.step(small.micro_batches(2, dtype=F32)).look


def test_one_bad_micro_batch_of_several_is_enough():
    engine = small.engine(small.net(), "look_sam", loss=Spoilt(2))  # by call: the third of four
    before = everything(engine)
    assert not bool(engine.step(small.micro_batches(0, accumulation=4)).seen.finite)
    assert same(everything(engine)[:4], before[:4])


def test_the_first_step_may_overflow_and_the_run_goes_on():
    """Nothing has state yet: what the skipped step leaves must be what a fresh start has."""
    trained = []
    for bad in ((), (0,), (1,)):
        engine = small.engine(small.net(), "look_sam", "sgd", loss=Spoilt(*bad))
        if bad:
            engine.step(small.micro_batches(99))
            engine.optimizer.steps = 0
        for t in range(6):
            engine.step(small.micro_batches(t))
        trained.append(small.weights(engine.module))
    for other in trained[1:]:
        assert all((a == b).all() for a, b in zip(trained[0], other, strict=True))


@pytest.mark.parametrize("scaled", [2.0**10, 2.0**20])
def test_the_loss_scale_is_in_no_result(scaled):
    """A power of two changes no bit of what is trained or reported, looks and clipping included."""
    results = []
    for scale in (1.0, scaled):
        engine = small.engine(small.net(dtype=F32), "look_sam", precision="fp16", clip=0.5)
        engine.backend.scaler.scale = scale
        engine.backend.dtype = None  # scaled as in fp16, computed in fp32, where nothing overflows
        seen = [engine.step(small.micro_batches(t, dtype=F32)).seen for t in range(5)]
        numbers = [float(x) for s in seen for x in (s.grad_norm, s.update_norm, s.gv_norm)]
        results.append((small.weights(engine.module), numbers))
    assert results[0][1] == results[1][1]
    assert all((a == b).all() for a, b in zip(results[0][0], results[1][0], strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_16_bits_a_look_reports_how_much_of_eps_was_really_applied(precision):
    engine = small.engine(small.net(dtype=F32), "look_sam", precision=precision)
    done = engine.step(small.micro_batches(0, dtype=F32))
    assert 0.3 < float(done.seen.eps_cosine) < 1.0
    assert engine.step(small.micro_batches(1, dtype=F32)).seen.eps_cosine is None


# --- what breaks in the middle -------------------------------------------------------------------


@each_method
def test_an_exception_in_the_second_pass_leaves_the_weights_where_they_were(name):
    calls = []

    def stumble(model, pair):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return small.loss(model, pair)

    engine = small.engine(small.net(nn.BatchNorm1d(small.HIDDEN)), name, loss=stumble)
    before = tensors(list(engine.module.parameters()))
    with pytest.raises(KeyboardInterrupt):
        engine.step(small.micro_batches(0, accumulation=2))
    assert same(tensors(list(engine.module.parameters())), before)
    assert bool(engine.step(small.micro_batches(0, accumulation=2)).seen.finite)


def test_a_layer_that_the_second_pass_leaves_out_has_a_gradient_of_zero_there():
    """It was missing from ||g|| and from the projection, and was given no step."""
    net = nn.ModuleList([nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)])
    calls, x = [], torch.randn(8, 3)

    def loss(model, batch):
        calls.append(batch)
        value = model[0](batch).square().mean()
        return value + model[1](batch).square().mean() if len(calls) == 1 else value

    both = sum(layer(x).square().mean() for layer in net)
    grads = torch.autograd.grad(both, list(net.parameters()))
    optimizer = LookSAM(net.parameters(), torch.optim.SGD(net.parameters(), lr=0.1), k=3)
    report = Engine(net, optimizer, loss).step([x])
    want = torch.cat([g.view(-1) for g in grads]).norm()
    torch.testing.assert_close(report.seen.grad_norm.float(), want)
    assert net[1].weight in optimizer.state


def test_a_step_that_looks_by_its_number_asks_nothing_of_the_last(monkeypatch):
    """SAM waited for the device at every step to hear that it has to look."""
    net = small.net()
    engine = small.engine(net, "sam")
    asked = []
    monkeypatch.setattr(type(engine.optimizer), "must_retry_look", lambda _: asked.append(1))
    for t in range(3):
        assert engine.step(small.micro_batches(t)).look
    assert not asked


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_second_pass_is_tried_on_a_cpu_where_the_first_was_not_finite(precision):
    """In fp32 and bf16 it ran at weights of NaN, where a loss that samples raises."""
    engine = small.engine(small.net(dtype=F32), "sam", precision=precision)
    engine.loss = lambda model, pair: small.loss(model, pair) * float("inf")
    report = engine.step(small.micro_batches(0, dtype=F32))
    assert not report.seen.finite
    assert engine.passes == 1
