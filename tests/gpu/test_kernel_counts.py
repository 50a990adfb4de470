"""How many operators a step takes, how many bytes it moves, and that the host reads nothing.

ViT-B's 152 layers at a width of 4: the counts do not depend on the width.
"""

import os
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dist_looksam import Lamb, LookLayerSAM, LookSAM, kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU or TRITON_INTERPRET=1"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
NO_KERNEL = {  # operators that only make a view or take memory
    *("view", "unbind", "select", "slice", "split", "split_with_sizes", "detach", "expand"),
    *("as_strided", "alias", "unsqueeze", "empty", "empty_like", "new_empty", "empty_strided"),
    *("lift_fresh", "_record_function_enter_new", "_record_function_exit"),
}
CODE = ("sums", "add_blocks", "perturb", "combine", "count_steps", "base", "descend")
METHODS = {"lamb": LookLayerSAM, "adamw": LookSAM}


def vit_b(width=4, classes=10):
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    ends = [(1, width), (5, width), (width, 3), (width,), (width,), (width,), (classes, width)]
    return [*ends, (classes,), *(12 * block)]


class Operators(TorchDispatchMode):
    """Counts operators that launch a kernel; a read by the host is an error, but for flags on the
    CPU, where it costs nothing."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name == "_local_scalar_dense":
            assert INTERPRETED and args[0].dtype == torch.bool
        elif name not in NO_KERNEL:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """[(kernel, arguments)] of all launches of kernels. Without a GPU they are not run, which would
    take minutes (tests/gpu/test_kernels.py runs them): all sums are 0."""
    code, found = kernels.fit([torch.ones(1, device=DEVICE)]).code, []

    class Launched:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(code, name)

        def __getitem__(self, grid):
            def call(*args, **how):
                found.append((self.name, how))
                with _disable_current_modes():
                    if not INTERPRETED:
                        self.kernel[grid](*args, **how)
                    elif self.name == "add_blocks":
                        args[2].zero_()  # its out

            return call

    for name in CODE:
        monkeypatch.setattr(code, name, Launched(name))
    return found


def optimizer_of(base, clip):
    params = [torch.nn.Parameter(torch.randn(s, device=DEVICE)) for s in vit_b()]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    inner = Lamb(groups, lr=0.01) if base == "lamb" else torch.optim.AdamW(groups, fused=True)
    optimizer = METHODS[base](params, inner, rho=0.05, alpha=0.7, k=3)
    optimizer.clip = clip
    return optimizer, params


def give_gradients(params):
    for p in params:
        p.grad = torch.randn_like(p)


def counted(base, clip, launches):
    """(operators, launches) of steps 3, a look, and 4, another."""
    optimizer, params = optimizer_of(base, clip)
    found = []
    for step in range(5):
        optimizer.base_optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
        give_gradients(params)
        looks = optimizer.looks()
        launches.clear()
        with Operators() as operators:
            if looks:
                optimizer.perturb()
                with _disable_current_modes():
                    give_gradients(params)
            optimizer.update()
        found.append((operators.counts, list(launches)))
    return found[3], found[4]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("base", METHODS)
def test_a_step_takes_fewer_than_50_operators_and_reads_nothing(base, clip, launches):
    look, other = counted(base, clip, launches)
    assert sum(other[0].values()) + len(other[1]) < 50, other
    assert sum(look[0].values()) + len(look[1]) < 70, look


def tensors_moved(name, how):
    """Tensors of the layers' sizes that one launch reads or writes, 4 bytes an entry: the lists
    that the kernel's docstring in kernels/code.py names."""
    used = {key for key, value in how.items() if value is True}
    if name == "sums":
        return 1 + ("TWO" in used)
    if name == "perturb":
        return 3
    if name == "descend":
        return 3
    if name == "combine":
        return 2 + bool({"LAST", "KEPT"} & used) + ("NEW" in used)
    if name == "base":  # w, x, m, v are read, m, v and u or w written
        return 7 + bool({"KEPT", "NEW"} & used) + ("STORE" in used)
    return 0


@pytest.mark.parametrize("base", METHODS)
def test_a_step_moves_at_most_70_bytes_a_parameter_in_the_mean_at_k_5(base, launches):
    look, other = counted(base, None, launches)
    copies = 2 * look[0]["_foreach_copy_"]  # of w, of g, and back to w: read and written
    of_look = copies + sum(tensors_moved(*launch) for launch in look[1])
    of_other = sum(tensors_moved(*launch) for launch in other[1])
    assert not any(name.startswith("_foreach") for name in other[0])
    mean = 4 * (of_look + 4 * of_other) / 5
    assert (of_look, of_other) == {"lamb": (25, 13), "adamw": (21, 10)}[base]
    assert mean <= 70
