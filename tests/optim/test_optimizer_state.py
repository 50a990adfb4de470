"""What is saved is all there is: a run cut anywhere goes on to the last bit."""

import copy
import io
import pickle

import problem
import pytest
import torch
from build import build, copies, same_bits
from problem import B2, Closure

MORE = 10
BASES = ("sgd", "adamw", "lamb", "lars")
NAMES = ("sam", "sam_k", "look_sam", "layer_sam", "look_layer_sam")


def saved_and_loaded(state):
    """Through a file, as the loader of untrusted files reads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_future(one, other, steps=MORE):
    for _ in range(steps):
        assert one.step() == other.step(), f"step {one.t - 1}: one looks, the other does not"
        assert same_bits(one.params, other.params), f"they part at step {one.t - 1}"


def resumed(closure, name, base, **how):
    """A closure on new parameters and a new optimizer that know only what was saved."""
    saved = saved_and_loaded(
        {"weights": copies(closure.params), "optimizer": closure.optimizer.state_dict()}
    )
    params = [torch.nn.Parameter(w) for w in saved["weights"]]
    optimizer = build(params, name, base, **how)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.steps == closure.t
    on = Closure(params, optimizer)
    on.t = closure.t
    return on


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_cut_run_goes_on_to_the_last_bit(name, base, steps):
    """k = 3: after steps 1 and 5 the next is a reuse step, after 3 a look."""
    params = problem.parameters(torch.float32)
    closure = problem.train(params, build(params, name, base), steps)
    assert_same_future(closure, resumed(closure, name, base))


@pytest.mark.parametrize("name", ["sam_k", "look_sam"])
@pytest.mark.parametrize("bad", [(0, 2), (3, 1), (3, 2)])
def test_a_look_that_is_owed_is_still_owed_after_a_resume(name, bad):
    """Saved right after a look was skipped: the next step looks, though t mod k is not 0."""
    params = problem.parameters(torch.float32)
    closure = problem.train(params, build(params, name, "adamw"), bad[0] + 1, bad=[bad])
    assert_same_future(closure, resumed(closure, name, "adamw"))


def test_saving_changes_nothing():
    params, others = problem.parameters(), problem.parameters()
    closure = problem.train(params, build(params, "look_sam", "lamb"), 4)
    undisturbed = problem.train(others, build(others, "look_sam", "lamb"), 4)
    saved_and_loaded(closure.optimizer.state_dict())
    assert_same_future(closure, undisturbed)


def test_the_saved_groups_win_over_the_new_ones():
    """As torch: lr, rho and alpha come back with the state, whatever was given meanwhile."""
    params = problem.parameters()
    closure = problem.train(params, build(params, "look_sam", "sgd"), 4)
    others = [x | {"lr": 9.0, "rho": 9.0, "alpha": 9.0} for x in problem.GROUPS]
    on = resumed(closure, "look_sam", "sgd", groups=others)
    assert_same_future(closure, on)


@pytest.mark.parametrize("outer", [True, False], ids=["into the wrapper", "into the base"])
def test_after_loading_both_objects_still_share_their_groups(outer):
    params = problem.parameters()
    optimizer = build(params, "look_sam", "sgd")
    target = optimizer if outer else optimizer.base_optimizer
    target.load_state_dict(saved_and_loaded(target.state_dict()))
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    optimizer.param_groups[0]["lr"] = 0.0
    before = copies(params)
    problem.train(params, optimizer, 1)
    assert same_bits([params[i] for i in problem.GROUPS[0]["layers"]],
                     [before[i] for i in problem.GROUPS[0]["layers"]])  # fmt: skip


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_deep_copy_lives_its_own_life_and_the_same_one(name, base):
    """torch's own __getstate__ keeps three attributes; base, counter and k are not among them."""
    params = problem.parameters()
    closure = problem.train(params, build(params, name, base), 4)
    twin = copy.deepcopy(closure)
    assert twin.params[B2] is not params[B2]
    assert twin.optimizer.param_groups is twin.optimizer.base_optimizer.param_groups
    assert_same_future(closure, twin)


@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_optimizer_goes_on(name):
    params = problem.parameters()
    closure = problem.train(params, build(params, name, "adamw"), 4)
    twin = pickle.loads(pickle.dumps(closure))
    assert_same_future(closure, twin)


@pytest.mark.parametrize("name", ["look_sam", "look_layer_sam"])
def test_a_lost_g_v_is_looked_for_at_once(name):
    params = problem.parameters()
    closure = problem.train(params, build(params, name), 4)
    for x in params:
        closure.optimizer.state[x].pop("g_v")
    assert [closure.step() for _ in range(3)] == [2, 1, 2]


def test_g_v_is_kept_once_and_nothing_else_of_its_size_is():
    """Memory: g_v alone outlives a step; g and w0 do not."""
    params = problem.parameters()
    closure = problem.train(params, build(params, "look_sam", "sgd"), 4)
    kept = {}
    for source in (closure.optimizer, closure.optimizer.base_optimizer):
        for x in params:
            for name, value in source.state[x].items():
                if torch.is_tensor(value) and value.numel() == x.numel() > 1:
                    kept.setdefault(name, set()).add(value.data_ptr())
    assert {name: len(tensors) for name, tensors in kept.items()} == {
        "g_v": len(params),
        "momentum_buffer": len(params),
    }


def brought(closure, steps=10, owed=False):
    """What DeepSpeed's loader of universal checkpoints does to the groups."""
    for group in closure.optimizer.param_groups:
        group["sharpness"] = {"steps": steps, "owed": owed}
    return closure.optimizer


def after_four_steps():
    params = problem.parameters()
    return problem.train(params, build(params, "look_sam"), 4)


READ = {
    "steps": lambda o: o.steps,
    "state_dict": lambda o: o.state_dict()["sharpness"]["steps"],
    "owed, then steps": lambda o: o.must_retry_look() and o.steps,
    "looks, then steps": lambda o: o.looks() and o.steps,
}


@pytest.mark.parametrize("how", READ)
def test_counters_that_came_in_the_groups_count_at_once(how):
    """They waited for the next step: saved before it, the state said 4 and the groups held 10."""
    optimizer = brought(after_four_steps(), owed=True)
    assert READ[how](optimizer) == 10
    assert optimizer.looks() and optimizer.state_dict()["sharpness"] == {"steps": 10, "owed": True}
    assert not any("sharpness" in group for group in optimizer.param_groups)


def test_what_is_loaded_or_set_after_counters_came_in_the_groups_stays():
    """The next step once put the groups' own, older numbers over what had been loaded."""
    saved = after_four_steps().optimizer.state_dict()
    loaded, counted, owing = (brought(after_four_steps(), owed=owed) for owed in (1, 1, 0))
    loaded.load_state_dict(saved)
    counted.steps = 7
    counted.record_look(None)
    owing.record_look(torch.tensor(False))
    for optimizer, steps, owed in ((loaded, 4, False), (counted, 7, False), (owing, 10, True)):
        optimizer.looks()
        assert (optimizer.steps, optimizer.must_retry_look()) == (steps, owed)


def test_counters_in_the_groups_disturb_no_other_code():
    """The base's own state is torch's; a scheduler and a new group come, and a plain torch
    checkpoint replaces the groups: the counters survive all of it."""
    optimizer = brought(after_four_steps())
    base = optimizer.base_optimizer
    plain = torch.optim.SGD([{"params": g["params"]} for g in base.param_groups], lr=0.5)
    base.load_state_dict(plain.state_dict())
    assert optimizer.steps == 10 and optimizer.param_groups[0]["lr"] == 0.5
    after = after_four_steps()
    brought(after)
    groups = after.optimizer.base_optimizer.state_dict()["param_groups"]
    assert not any("sharpness" in group for group in groups)
    schedule = torch.optim.lr_scheduler.StepLR(brought(after, steps=11), 1, gamma=0.5)
    lr = after.optimizer.param_groups[0]["lr"]
    after.step()
    schedule.step()
    after.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert after.optimizer.param_groups[0]["lr"] == lr / 2 and after.optimizer.steps == 12
    names = [set(g) - {"initial_lr"} for g in after.optimizer.param_groups]
    assert names[0] == names[-1]
