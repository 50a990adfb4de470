"""--perturb and the group setting `perturb`: which layers are moved, and what is refused."""

import problem
import pytest
import torch
from torch import nn

from dist_looksam import SAM, Lamb
from dist_looksam.errors import ConfigError
from dist_looksam.optim.perturbed import perturbed
from dist_looksam.optim.table import groups


class RmsNorm(nn.Module):
    """Not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Linear(4, 4), nn.LayerNorm(4),
                         nn.GroupNorm(2, 4), RmsNorm())  # fmt: skip


def names(model: nn.Module, which: str) -> list[str]:
    found = perturbed(model, which)
    return [name for name, p in model.named_parameters() if id(p) in found]


def test_norms_are_found_by_the_class_of_their_module():
    ends = ("1.", "3.", "4.", "5.")
    model = net()
    assert names(model, "norms") == [n for n, _ in model.named_parameters() if n.startswith(ends)]
    assert len(names(model, "all")) == 11
    assert names(model, r"^0\.|bias$") == [
        "0.weight", "0.bias", "1.bias", "2.bias", "3.bias", "4.bias"
    ]  # fmt: skip


def test_layers_that_stay_have_groups_of_their_own():
    made = groups(net(), 0.1, "norms")
    assert [(g["weight_decay"], g["perturb"], len(g["params"])) for g in made] == [
        (0.1, False, 2), (0.0, True, 7), (0.0, False, 2),
    ]  # fmt: skip
    assert [g["perturb"] for g in groups(net(), 0.1)] == [True, True]


@pytest.mark.parametrize("which, says", [
    ("(", "regular expression of layer names, got '\\('"), ("", "got an empty one"),
    ("attention", "got 'attention', which fits none of its 11 layers, such as 0.weight"),
])  # fmt: skip
def test_an_expression_that_fits_nothing_or_is_none_is_a_sentence(which, says):
    with pytest.raises(ConfigError, match=says):
        perturbed(net(), which)


def test_norms_of_a_network_without_any_are_a_sentence():
    with pytest.raises(ConfigError, match="perturb must fit normalisation layers of Linear"):
        perturbed(nn.Linear(2, 2), "norms")


def of_groups(*values: object, along: str = "gradient") -> tuple[list, SAM]:
    params = problem.parameters()
    parts = [params[:2], params[2:]]
    own = [{"params": p, "perturb": v} for p, v in zip(parts, values, strict=True)]
    base = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    return params, SAM(own, base, rho=0.1, along=along)


@pytest.mark.parametrize("values, says", [
    ((1, True), "perturb of a group must be True or False, got 1"),
    ((False, False), "perturb must be True in at least one group"),
])  # fmt: skip
def test_a_wrong_group_is_a_sentence(values, says):
    with pytest.raises(ConfigError, match=says):
        of_groups(*values)


@pytest.mark.parametrize("along", ["gradient", "momentum"])
def test_other_layers_stay_bit_for_bit_and_the_rest_moves_by_rho(along):
    params, optimizer = of_groups(False, True, along=along)
    problem.train(params, optimizer, 2)
    before = [p.detach().clone() for p in params]
    problem.loss(params, 2).backward()
    optimizer.perturb_ahead() if along == "momentum" else optimizer.perturb()
    assert all(torch.equal(p, b) for p, b in zip(params[:2], before[:2], strict=True))
    moved = torch.cat([(p - b).flatten() for p, b in zip(params[2:], before[2:], strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(0.1, rel=1e-9)
    optimizer.abandon()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert not optimizer.perturbed


def test_msam_perturbs_against_the_momentum():
    """As the authors' code does: `p.sub_(exp_avg, alpha=rho / norm)`."""
    params, optimizer = of_groups(True, True, along="momentum")
    assert not optimizer.perturb_ahead()  # no momentum yet
    problem.train(params, optimizer, 2)
    before = [p.detach().clone() for p in params]
    v = [optimizer.state[p]["momentum_buffer"] for p in params]
    norm = torch.cat([x.flatten() for x in v]).norm()
    assert optimizer.perturb_ahead()
    for p, b, x in zip(params, before, v, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * x / norm, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make, says", [
    (lambda ps: torch.optim.SGD(ps, lr=0.1), "got SGD with momentum 0"),
    (lambda ps: Lamb(ps, betas=(0.0, 0.9)), r"got Lamb with betas \(0.0, 0.9\)"),
    (lambda ps: torch.optim.Adagrad(ps), "got Adagrad; use SGD"),
])  # fmt: skip
def test_msam_on_a_base_without_momentum_is_a_sentence(make, says):
    params = problem.parameters()
    with pytest.raises(ConfigError, match=says):
        SAM(params, make(params), along="momentum")


@pytest.mark.parametrize("how", [{"k": 5}, {"alpha": 0.5}])
def test_msam_with_settings_of_two_passes_is_a_sentence(how):
    params = problem.parameters()
    with pytest.raises(ConfigError, match="has one pass a step and no g_s"):
        SAM(params, torch.optim.AdamW(params), along="momentum", **how)


def test_msam_perturbs_from_look_from_on():
    """So that it can begin after the warm-up, as in its authors' ViTs."""
    params = problem.parameters()
    optimizer = SAM(
        params, torch.optim.SGD(params, lr=0.1, momentum=0.9), along="momentum", look_from=3
    )
    moved = []
    for _ in range(5):
        moved.append(optimizer.perturbs_ahead())
        problem.train(params, optimizer, 1)
    assert moved == [False] * 3 + [True] * 2 and not optimizer.looks()
