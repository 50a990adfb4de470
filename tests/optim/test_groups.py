"""Groups: a setting in one is obeyed, whichever of the two optimizers was given it, or refused."""

import copy

import pytest
import torch
from build import copies, parameters
from torch import nn

from dist_looksam import SAM, Lamb, Lars, LookSAM
from dist_looksam.errors import ConfigError
from dist_looksam.optim.sharpness import Sharpness

ALL_BASES = {
    "Adadelta": {"rho": 0.8}, "RMSprop": {"alpha": 0.95}, "ASGD": {"alpha": 0.6}, "SGD": {},
    "AdamW": {}, "Adagrad": {}, "Rprop": {},
}  # fmt: skip


def three():
    return parameters([1.0, 2.0], [3.0, 4.0], [5.0])


def of(optimizer: Sharpness, name: str) -> dict[int, float]:
    """rho or alpha of every parameter, by id."""
    return {id(p): optimizer.setting(g, name) for g in optimizer.param_groups for p in g["params"]}


def moved(optimizer, params) -> list[float]:
    """How far each parameter is moved for the second pass of a layer-wise look, over ||w||."""
    before = [p.detach().clone() for p in params]
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append([p.detach().clone() for p in params])
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    optimizer.step(closure)
    return [float((a - b).norm() / b.norm()) for a, b in zip(seen[1], before, strict=True)]


def test_own_groups_are_obeyed_where_the_base_has_one_group_for_all():
    """LookSAM([{a, rho .1}, {b, rho .9}], SGD(a + b)) gave .1 to all: the first parameter's group
    decided for the base's. The base's group is split."""
    a, b, c = three()
    base = torch.optim.SGD([a, b, c], lr=0.1, momentum=0.9)
    own = [{"params": [a, c], "rho": 0.1}, {"params": [b], "rho": 0.9, "alpha": 0.3}]
    optimizer = SAM(own, base, scope="layer")
    assert moved(optimizer, [a, b, c]) == pytest.approx([0.1, 0.9, 0.1])
    assert of(optimizer, "alpha") == {id(a): 0.0, id(b): 0.3, id(c): 0.0}
    assert [g["momentum"] for g in base.param_groups] == [0.9, 0.9]
    assert optimizer.param_groups is base.param_groups


def test_a_groups_rho_is_obeyed_where_it_stands_in_the_base():
    """It was overwritten with the default."""
    a, b, c = three()
    base = torch.optim.SGD([{"params": [a], "rho": 0.2}, {"params": [b, c]}], lr=0.1)
    assert moved(SAM([a, b, c], base, rho=0.05, scope="layer"), [a, b, c]) == pytest.approx(
        [0.2, 0.05, 0.05]
    )


def test_a_value_that_no_group_named_is_the_newest_optimizers():
    """What an earlier optimizer around the same base has filled in is no group's own."""
    a, b, c = three()
    base = torch.optim.SGD([{"params": [a], "rho": 0.2}, {"params": [b, c]}], lr=0.1)
    SAM([a, b, c], base, rho=0.05)
    again = LookSAM([a, b, c], base, rho=0.03)
    assert of(again, "rho") == {id(a): 0.2, id(b): 0.03, id(c): 0.03}


def test_groups_with_names_are_split_with_their_names():
    model = nn.Linear(2, 2)
    base = torch.optim.SGD(list(model.named_parameters()), lr=0.1)
    own = [
        {"params": [("weight", model.weight)], "rho": 0.1},
        {"params": [("bias", model.bias)], "rho": 0.2},
    ]
    optimizer = LookSAM(own, base)
    assert [g.get("param_names") for g in optimizer.param_groups] in (
        [["weight"], ["bias"]], [None, None],
    )  # fmt: skip


def test_what_the_user_passes_is_not_written_to():
    """torch fills the dictionaries that it is given; the same list for both optimizers works."""
    a, b, c = three()
    groups = [{"params": [a], "rho": 0.1}, {"params": [b, c]}]
    own = [{**g} for g in groups]
    optimizer = LookSAM(own, torch.optim.SGD([{**g} for g in groups], lr=0.1), rho=0.05)
    assert own == groups
    assert of(optimizer, "rho") == {id(a): 0.1, id(b): 0.05, id(c): 0.05}
    base = torch.optim.AdamW([a, b, c], lr=0.1)
    assert LookSAM(base.param_groups, base).param_groups[0]["lr"] == 0.1


REFUSED = {
    "lr beside the base": ({"lr": 0.5}, {}, "lr must be set in the groups of the base"),
    "decay beside the base": ({"weight_decay": 0.5}, {}, "weight_decay must be set in the groups"),
    "unknown": ({"momentun": 0.5}, {}, "momentun must be set in the groups of the base"),
    "k": ({"k": 2}, {}, "k must be the same for all groups, got k=2"),
    "p": ({"p": 3.0}, {}, "p must be the same for all groups"),
    "k of the base": ({}, {"k": 2}, "k must be the same for all groups"),
    "twice": ({"rho": 0.1}, {"rho": 0.2}, "rho of a group must be set once, got 0.1 and"),
    "negative": ({"rho": -0.1}, {}, "rho must be >= 0"),
    "negative in the base": ({}, {"alpha": -0.1}, "alpha must be >= 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_would_not_be_obeyed_is_refused(name):
    """lr, weight_decay, k and p in LookSAM's groups were taken and ignored."""
    own, theirs, says = REFUSED[name]
    a, b, c = three()
    base = torch.optim.SGD([{"params": [a, b, c], **theirs}], lr=0.1)
    with pytest.raises(ConfigError, match=says):
        LookSAM([{"params": [a, b, c], **own}], base)


def test_a_setting_that_is_the_bases_own_value_may_stand_in_both():
    a, b, c = three()
    base = torch.optim.SGD([{"params": [a, b, c], "lr": 0.5}], lr=0.1)
    assert LookSAM([{"params": [a, b, c], "lr": 0.5}], base).param_groups[0]["lr"] == 0.5


def test_a_scheduler_made_before_is_not_left_with_fewer_groups():
    a, b, c = three()
    base = torch.optim.SGD([a, b, c], lr=0.1)
    torch.optim.lr_scheduler.ExponentialLR(base, 0.9)
    with pytest.raises(ConfigError, match="a scheduler that counts groups already"):
        LookSAM([{"params": [a, b], "rho": 0.1}, {"params": [c], "rho": 0.2}], base)


@pytest.mark.parametrize("name", ALL_BASES)
def test_a_base_keeps_its_own_rho_and_alpha(name):
    """Adadelta has a rho and RMSprop an alpha: they became SAM's radius, and 0."""
    params, alone = three(), three()
    make = getattr(torch.optim, name)
    base = make(params, lr=0.1, **ALL_BASES[name])
    optimizer = SAM(params, base, rho=0.0)
    plain = make(alone, lr=0.1, **ALL_BASES[name])
    for _ in range(3):
        moved(optimizer, params)
        plain.zero_grad()
        sum((p**2).sum() for p in alone).backward()
        plain.step()
    assert all(torch.equal(x, y) for x, y in zip(params, alone, strict=True))
    optimizer.add_param_group({"params": parameters([1.0]), "rho": 0.4})
    assert optimizer.setting(base.param_groups[1], "rho") == 0.4
    for key, value in ALL_BASES[name].items():
        assert base.param_groups[0][key] == value
        assert base.param_groups[1][key] == value


def test_a_group_that_the_base_was_given_later_has_the_defaults():
    """The next step was a KeyError: 'rho'."""
    a, b, c = three()
    base = torch.optim.SGD([a, b], lr=0.1)
    optimizer = SAM([a, b], base, rho=0.07, scope="layer")
    base.add_param_group({"params": [c]})
    assert moved(optimizer, [a, b, c]) == pytest.approx([0.07] * 3)


@pytest.mark.parametrize("wrong", [{"k": 2}, {"rho": -1.0}, {"decompose": "layer"}])
def test_a_group_added_later_is_checked(wrong):
    a, b, c = three()
    optimizer = LookSAM([a, b], torch.optim.SGD([a, b], lr=0.1))
    with pytest.raises(ConfigError):
        optimizer.add_param_group({"params": [c], **wrong})
    assert len(optimizer.base_optimizer.param_groups) == 1


@pytest.mark.parametrize("into_base", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_a_plain_optimizers_state_is_loaded_and_rho_stays(into_base, copied):
    """Going on from AdamW's checkpoint with LookSAM was a KeyError: 'rho' in the next step."""
    plain = torch.optim.AdamW([{"params": three()[:1]}, {"params": three()[1:]}], lr=0.3)
    a, b, c = params = three()
    base = torch.optim.AdamW([{"params": [a]}, {"params": [b, c]}], lr=0.1)
    optimizer = SAM([{"params": [a], "rho": 0.2}, {"params": [b, c]}], base, rho=0.05,
                    scope="layer")  # fmt: skip
    if copied:
        optimizer, params = copy.deepcopy((optimizer, params))
    (optimizer.base_optimizer if into_base else optimizer).load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert moved(optimizer, params) == pytest.approx([0.2, 0.05, 0.05])


def test_a_loaded_rho_is_the_saved_one():
    a, b, _ = three()
    saved = SAM([a], torch.optim.SGD([a], lr=0.1), rho=0.4).state_dict()
    other = SAM([b], torch.optim.SGD([b], lr=0.1), rho=0.1)
    other.load_state_dict(saved)
    assert of(other, "rho") == {id(b): 0.4}


# --- LAMB's and LARS's trust ratio ---------------------------------------------------------------


@pytest.mark.parametrize("make", [Lamb, Lars])
def test_without_naming_weight_decay_a_layers_step_is_lr_times_its_norm(make):
    """Lamb(params, lr=.01), as docs/deepspeed.md writes it, was Adam: weight decay 0 by default
    switched every trust ratio off."""
    small, large = parameters([0.1, 0.2], [10.0, 20.0])
    before = copies([small, large])
    optimizer = make([small, large], lr=0.01)
    for p in (small, large):
        p.grad = torch.tensor([1.0, -0.5], dtype=p.dtype)
    optimizer.step()
    for p, w in zip((small, large), before, strict=True):
        assert float((p.detach() - w).norm() / w.norm()) == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize("make", [Lamb, Lars])
def test_no_weight_decay_anywhere_is_told(make, recwarn):
    make(three(), lr=0.01)
    make([{"params": parameters([1.0]), "weight_decay": 0.1},
          {"params": parameters([1.0]), "weight_decay": 0.0}], lr=0.01)  # fmt: skip
    assert not recwarn.list
    with pytest.warns(UserWarning, match="so that all ratios are 1"):
        make(three(), lr=0.01, weight_decay=0.0)
