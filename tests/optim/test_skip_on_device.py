"""LAMB and LARS skip a step by a number on the device, as no CPU run does: tried by hand here."""

import problem
import pytest
import torch
from build import build_base, copies, same_bits
from torch.utils._python_dispatch import TorchDispatchMode


def state_of(optimizer):
    return [v.clone() for s in optimizer.state.values() for v in s.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_found_inf_leaves_weights_and_state_to_the_bit(name, dtype):
    params = problem.parameters(dtype)
    optimizer = build_base(params, name)
    closure = problem.Closure(params, optimizer)
    for t in range(4):
        optimizer.found_inf = torch.tensor(0.0)
        closure.step()
        weights, state = copies(params), state_of(optimizer)
        optimizer.found_inf = torch.tensor(1.0)
        closure.t = t + 100
        for p in params:
            if p.grad is not None:
                p.grad.view(-1)[0] = float("nan")
        optimizer.step()
        assert same_bits(params, weights)
        assert same_bits(state_of(optimizer), state)
        closure.t = t + 1


class NothingIsRead(TorchDispatchMode):
    """An error where the host asks for a number: on a GPU, it would wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_no_code_reads_whether_a_step_was_skipped(name):
    params = problem.parameters()
    optimizer = build_base(params, name)
    closure = problem.Closure(params, optimizer)
    closure.step()
    optimizer.found_inf = torch.tensor(0.0)
    with NothingIsRead():
        optimizer.step()


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_found_inf_of_zero_is_no_found_inf(name):
    trained = []
    for given in (None, 0.0):
        params = problem.parameters()
        optimizer = build_base(params, name)
        closure = problem.Closure(params, optimizer)
        for _ in range(5):
            optimizer.found_inf = None if given is None else torch.tensor(given)
            closure.step()
        trained.append(copies(params) + state_of(optimizer))
    assert same_bits(*trained)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_parameters_of_two_dtypes_in_one_group_step_as_in_two(name):
    """A group is worked on dtype by dtype."""
    trained = []
    for together in (True, False):
        narrow, wide = problem.parameters(torch.float32), problem.parameters(torch.float64)
        lists = [[*narrow, *wide]] if together else [narrow, wide]
        groups = [{"params": each, "weight_decay": 0.1} for each in lists]
        from dist_looksam import Lamb, Lars

        optimizer = (Lamb if name == "lamb" else Lars)(groups, lr=0.05)
        for t in range(3):
            optimizer.zero_grad()
            problem.loss(narrow, t).backward()
            problem.loss(wide, t).backward()
            optimizer.step()
        trained.append(copies(narrow) + copies(wide))
    assert same_bits(*trained)
