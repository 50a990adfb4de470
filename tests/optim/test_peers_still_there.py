"""Mistakes that LookSAM in pytorch_optimizer 4.1.0 makes: not here, and shown to be there.

Every check takes either code through one interface and must pass with ours and fail with theirs,
so these tests are known to be able to fail.
"""

import numpy as np
import pytest
import torch
from build import bowl, g_v_of, parameters

from dist_looksam import LookSAM

# --- one interface for both ----------------------------------------------------------------------


class Ours:
    """LookSAM of the package around plain SGD."""

    def __init__(self, params, *, rho=0.05, k=3, lr=0.1, model=None):
        params = list(params)
        base = torch.optim.SGD(params, lr=lr)
        self.optimizer = LookSAM(params, base, rho=rho, k=k, alpha=0.7, model=model)
        self.params = params

    def step(self, closure):
        self.optimizer.step(closure)

    def g_v(self):
        return g_v_of(self.optimizer, self.params)


class Peer:
    """LookSAM of pytorch_optimizer, used as its own example does."""

    def __init__(self, params, *, rho=0.05, k=3, lr=0.1, model=None):
        from pytorch_optimizer import LookSAM as Theirs

        self.params = list(params)
        self.optimizer = Theirs(self.params, torch.optim.SGD, rho=rho, k=k, alpha=0.7, lr=lr)

    def step(self, closure):
        closure()
        self.optimizer.step(closure)

    def g_v(self):
        return [self.optimizer.state[x]["gv"] for x in self.params]


def closure_of(made, loss, *, watch=lambda: None):
    def closure():
        made.optimizer.zero_grad()
        value = loss()
        value.backward()
        watch()
        return value

    return closure


# --- the checks ----------------------------------------------------------------------------------


def check_reuse_steps_cost_one_gradient(make):
    params = parameters([1.0, 1.0])
    made, passes = make(params, k=3), []
    closure = closure_of(
        made, lambda: bowl(params, [torch.tensor([3.0, 4.0])]), watch=lambda: passes.append(1)
    )
    for want in (2, 1, 1, 2):
        passes.clear()
        made.step(closure)
        assert len(passes) == want


def check_g_v_is_taken_over_the_whole_model(make):
    """w = (1), (1), g = (3), (4): a layer of one number has no direction of its own but +-1.

    Over the model g_v = (-.192, .144), as in test_reference; per tensor it is 0, 0.
    """
    params = parameters([1.0], [1.0])
    made = make(params, rho=0.5)
    made.step(closure_of(made, lambda: bowl(params, [3.0, 4.0])))
    got = torch.cat(made.g_v()).numpy()
    np.testing.assert_allclose(got, [-0.192, 0.144], rtol=1e-9)


def check_both_passes_draw_the_same_dropout(make):
    params, masks = parameters([1.0, 1.0, 1.0, 1.0]), []

    def loss():
        masks.append(torch.rand(4, dtype=torch.float64))
        return bowl(params, [masks[-1]])

    made = make(params)
    made.step(closure_of(made, loss))
    assert len(masks) == 2 and torch.equal(*masks)


def check_batch_norm_counts_one_pass(make):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    made = make(model.parameters(), model=model)
    made.step(closure_of(made, lambda: model(torch.randn(16, 4)).pow(3).sum()))
    assert int(model[1].num_batches_tracked) == 1


def check_an_overflow_up_the_hill_skips_the_step(make):
    params, passes = parameters([1.0, 1.0]), []

    def overflow_in_the_second_pass():
        passes.append(1)
        if len(passes) == 2:
            params[0].grad[0] = float("inf")

    made = make(params)
    made.step(closure_of(made, lambda: bowl(params, [3.0]), watch=overflow_in_the_second_pass))
    assert len(passes) == 2
    assert torch.equal(params[0].detach(), torch.ones(2, dtype=torch.float64))


STILL_THERE = {
    "pays for two gradients on every step whatever k is": check_reuse_steps_cost_one_gradient,
    "takes norms per tensor": check_g_v_is_taken_over_the_whole_model,
    "draws new dropout for the second pass": check_both_passes_draw_the_same_dropout,
    "counts BatchNorm twice": check_batch_norm_counts_one_pass,
    "lets an overflow in the second pass into the weights": (
        check_an_overflow_up_the_hill_skips_the_step
    ),
}
each_check = pytest.mark.parametrize("check", STILL_THERE.values(), ids=STILL_THERE)


@each_check
def test_here_not(check):
    """The id says what the peer does. Paying twice makes LookSAM cost what SAM does, its only
    point; per-tensor norms give another g_v; the rest make g_v noise, or the weights NaN."""
    check(Ours)


@pytest.mark.needs("pytorch_optimizer")
@each_check
def test_pytorch_optimizer_still(check):
    """The checks above can fail: they do, on a code in use."""
    with pytest.raises(AssertionError):
        check(Peer)
