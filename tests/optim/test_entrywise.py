"""The trial of a base optimizer on a small layer: whole, and in halves as two ranks have them."""

import pytest
import torch
from torch import nn

from dist_looksam import Lamb, Lars
from dist_looksam.errors import ConfigError
from dist_looksam.optim import entrywise


def check_entrywise(base):
    entrywise.check_entrywise(base, torch.device("cpu"))


def over_a_matrix(kind, **settings):
    return kind([nn.Parameter(torch.ones(3, 2))], **settings)


class Late(torch.optim.SGD):
    """SGD that from its 26th step on divides by the norm of each tensor."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        for p in self.param_groups[0]["params"]:
            p.grad /= p.grad.norm() if self.calls > 25 else 1.0
        return super().step(closure)


class Wide(torch.optim.SGD):
    """SGD that centres the gradients of matrices with sides above 128."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.ndim == 2 and min(p.shape) > 128:
                p.grad -= p.grad.mean(1, keepdim=True)
        return super().step(closure)


class Clipped(torch.optim.SGD):
    """SGD that limits the norm of all gradients that it has; its class takes no settings."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)

    def step(self, closure=None):
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1e-3)
        return super().step(closure)


class Odd(torch.optim.SGD):
    """One that cannot be made over other parameters."""

    def __init__(self, params, model=None):
        super().__init__(params, lr=model.lr)


@pytest.mark.parametrize("kind", sorted(entrywise.KNOWN, key=lambda kind: kind.__name__))
def test_what_is_known_to_update_each_weight_by_itself_also_passes_the_trial(kind, monkeypatch):
    monkeypatch.setattr(entrywise, "KNOWN", set())
    check_entrywise(over_a_matrix(kind))


@pytest.mark.parametrize("kind", [Lamb, Lars])
def test_a_base_that_is_given_the_layers_in_its_shards_passes(kind):
    check_entrywise(over_a_matrix(kind, weight_decay=0.1))


@pytest.mark.parametrize("kind", [Late, Wide])
@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_a_base_that_needs_layers_only_later_or_only_of_large_ones_is_refused(kind, lr):
    """Also where a warm-up has set the learning rate to 0, with which nothing moves."""
    with pytest.raises(ConfigError, match=f"got {kind.__name__}, which updates half a layer"):
        check_entrywise(over_a_matrix(kind, lr=lr))


def test_a_base_that_adds_up_over_its_parameters_is_refused():
    with pytest.raises(ConfigError, match="got Clipped, which"):
        check_entrywise(over_a_matrix(Clipped))


def test_a_base_that_needs_layers_in_one_of_its_groups_is_refused():
    class Grouped(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad /= p.grad.norm() if group["unit"] else 1.0
            return super().step(closure)

    groups = [{"params": [nn.Parameter(torch.ones(2))], "unit": unit} for unit in (False, True)]
    check_entrywise(Grouped(groups[:1], lr=0.1))
    with pytest.raises(ConfigError, match="got Grouped, which"):
        check_entrywise(Grouped(groups, lr=0.1))


def test_a_base_that_cannot_be_tried_is_refused():
    base = over_a_matrix(Odd, model=type("Model", (), {"lr": 0.1}))
    with pytest.raises(ConfigError, match=r"cannot be checked of Odd, .* raises AttributeError"):
        check_entrywise(base)


def test_the_trial_leaves_random_numbers_and_the_base_as_they_were():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            torch.rand(3)
            return super().step(closure)

    base, state = over_a_matrix(Noisy, lr=0.1, momentum=0.9), torch.get_rng_state()
    check_entrywise(base)
    assert torch.equal(torch.get_rng_state(), state) and not base.state
    assert torch.equal(base.param_groups[0]["params"][0], torch.ones(3, 2))


@pytest.mark.needs("pytorch_optimizer")
@pytest.mark.parametrize("name, passes", [
    ("Lion", True), ("AdaBelief", True), ("QHAdam", True), ("ADOPT", True),
    ("Shampoo", False), ("SOAP", False), ("CAME", False), ("Prodigy", False), ("NovoGrad", False),
    ("StableAdamW", False), ("Lamb", False), ("AdamP", False),
])  # fmt: skip
def test_bases_of_others_are_told_apart(name, passes):
    import pytorch_optimizer

    base = over_a_matrix(getattr(pytorch_optimizer, name))
    if passes:
        check_entrywise(base)
        return
    with pytest.raises(ConfigError, match=f"got {name}, which"):
        check_entrywise(base)
