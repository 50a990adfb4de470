"""Base optimizers: which can skip a step on the device, and which cannot be a base at all."""

import pytest
import torch
from build import parameters

from dist_looksam import SAM, Lamb, Lars, LookLayerSAM, LookSAM
from dist_looksam.errors import ConfigError
from dist_looksam.optim import table
from dist_looksam.optim.base import skips_on_device, step_unless

ONE = torch.tensor(1.0)


def with_grads(values=(1.0, 2.0)):
    (p,) = parameters(list(values))
    p.data = p.data.float()
    p.grad = torch.ones_like(p)
    return p


class Foreign(torch.optim.SGD):
    """A third party's, which has a setting `fused` of its own and does not know found_inf."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad


def test_sgds_momentum_buffer_is_made_by_a_step_that_is_taken():
    """A skipped first step left it uninitialised, as torch's fused kernel makes it empty and fills
    it when it steps: weights of 1e15 two steps later. fp16's first step usually overflows."""
    p = with_grads()
    base = torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=True)
    assert not skips_on_device(base)
    assert not base.state  # asking has made nothing
    base.step()
    assert skips_on_device(base)
    kept = p.detach().clone(), base.state[p]["momentum_buffer"].clone()
    p.grad.fill_(float("nan"))
    step_unless(base, ONE)
    assert torch.equal(p, kept[0]) and torch.equal(base.state[p]["momentum_buffer"], kept[1])


def test_a_parameter_that_gets_its_first_gradient_late_has_no_buffer_yet():
    p, late = with_grads(), with_grads()
    late.grad = None
    base = torch.optim.SGD([p, late], lr=0.1, momentum=0.9, fused=True)
    base.step()
    assert skips_on_device(base)
    late.grad = torch.ones_like(late)
    assert not skips_on_device(base)


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    lambda p: torch.optim.Adam(p, lr=0.1, fused=True, amsgrad=True),
    lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    lambda p: Lamb(p, lr=0.1), lambda p: Lars(p, lr=0.1),
])  # fmt: skip
def test_those_that_skip_on_the_device_leave_a_first_step_to_the_bit(make):
    p, twin = with_grads(), with_grads()
    base, other = make([p]), make([twin])
    assert skips_on_device(base)
    before = p.detach().clone()
    p.grad.fill_(float("inf"))
    step_unless(base, ONE)
    assert torch.equal(p, before)
    for _ in range(3):
        for q, o in ((p, base), (twin, other)):
            q.grad = torch.ones_like(q)
            o.step()
    assert torch.equal(p, twin)


def test_no_other_optimizer_is_trusted_to_skip():
    """`fused` in any group was enough: a third party's optimizer, or one group of two."""
    p, q = with_grads(), with_grads()
    assert not skips_on_device(Foreign([p], lr=0.1, fused=True))
    mixed = [{"params": [p], "fused": True}, {"params": [q], "fused": False}]
    assert not skips_on_device(torch.optim.AdamW(mixed, lr=0.1))
    assert not skips_on_device(torch.optim.AdamW([p], lr=0.1))


@pytest.mark.parametrize("make", [SAM, LookSAM, LookLayerSAM])
def test_a_base_that_calls_a_closure_itself_is_refused(make):
    """LBFGS, another SAM: TypeError in the first step, or NaN."""
    params = parameters([1.0])
    for base in (torch.optim.LBFGS(params), SAM(params, torch.optim.SGD(params, lr=0.1))):
        with pytest.raises(ConfigError, match="must step from gradients alone"):
            make(params, base)


@pytest.mark.parametrize("make", [SAM, LookSAM, LookLayerSAM])
def test_who_comes_from_davda54_gets_a_hint(make):
    """SAM(params, torch.optim.SGD, lr=...) was a TypeError about lr, first_step no attribute."""
    params = parameters([1.0])
    with pytest.raises(ConfigError, match="must be an instance, got the class SGD; make it"):
        make(params, torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer = make(params, torch.optim.SGD(params, lr=0.1))
    for name in ("first_step", "second_step"):
        with pytest.raises(ConfigError, match=r"one call of step\(closure\)"):
            getattr(optimizer, name)(zero_grad=True)


def test_a_name_that_is_no_base_is_refused():
    """`build_base` made a Lamb of it."""
    with pytest.raises(ConfigError, match=r"base must be one of .*lamb.*, got 'adam'"):
        table.build_base("adam", parameters([1.0]), lr=0.1)


@pytest.mark.parametrize("make", [
    lambda p: SAM(p, torch.optim.SGD(p, lr=0.1)), lambda p: Lamb(p), lambda p: Lars(p),
])  # fmt: skip
def test_complex_parameters_are_refused(make):
    """Their norms were those of the real part alone."""
    with pytest.raises(ConfigError, match="parameters must be real, got one of shape \\(3,\\)"):
        make([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))])


def test_a_complex_parameter_added_later_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SAM([p], torch.optim.SGD([p], lr=0.1))
    late = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ConfigError, match="must be real"):
        optimizer.add_param_group({"params": [late]})
    assert len(optimizer.param_groups) == 1


class Renamed(torch.optim.SGD):
    """A base that keeps its momentum under a name of its own, as some do outside torch."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            kept = self.state[p].setdefault("momentum", torch.zeros_like(p))
            p.data.sub_(kept.mul_(0.9).add_(p.grad), alpha=0.1)


def test_an_ascent_along_a_momentum_of_another_name_is_refused():
    """MSAM found no momentum in any step, and was its base alone."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SAM([p], Renamed([p], lr=0.1, momentum=0.9), rho=1.0, along="momentum")

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    optimizer.state[p]["g_v"] = torch.zeros(3)  # of a run by LookSAM
    optimizer.step(closure)
    with pytest.raises(ConfigError, match="keeps it as momentum_buffer, got Renamed with momentum"):
        optimizer.step(closure)
