"""The host reads nothing from the device in a step between looks.

Counted on a CPU, whose tensors say that they are on a GPU, so that the code does what it does
there. On a real one tests/gpu/test_device.py lets torch raise where the host would wait. Under
ZeRO: tests/ranks/test_zero_overflow.py.
"""

import copy
from itertools import pairwise

import pytest
import small
import torch
from reads import Reads, as_on_a_gpu

from dist_looksam import Engine
from dist_looksam.optim import table, when
from dist_looksam.optim.later import Later


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    monkeypatch.setenv("DIST_LOOKSAM_KERNELS", "off")  # which need Triton
    with as_on_a_gpu():
        yield


def engine_of(name: str, base: str, k: int, **how) -> Engine:
    """With the base that skips on the device, as train.py has it there."""
    model = small.net(dtype=torch.float32)
    groups = table.groups(model, small.WEIGHT_DECAY)
    inner = table.build_base(base, groups, lr=small.LR[base], fused=base in ("adamw", "sgd"))
    rule = table.rule_of(name, k=k, **how)
    return Engine(model, table.build(inner, rule=rule, rho=0.05, alpha=0.7), small.loss)


@pytest.mark.parametrize("base", ["adamw", "lamb", "lars", "sgd"])
@pytest.mark.parametrize("name", ["adamw", "look_sam", "look_layer_sam"])
def test_the_host_reads_nothing_between_looks(name, base):
    """One number in the first step after a look: whether that was skipped."""
    k = 4 if table.method(name).settable_k else 1
    name = base if name == "adamw" else name
    engine = engine_of(name, base, k)
    counts = []
    for step in range(2 * k + 4):
        batches = small.micro_batches(step, dtype=torch.float32)
        with Reads() as reads:
            look = engine.step(batches).look
        counts.append((look, reads.count))
    pairs = list(pairwise(counts[4:]))  # fused SGD reads at its first step
    after_looks = [n for (before, _), (look, n) in pairs if before and not look]
    others = [n for (before, _), (look, n) in pairs if not before and not look]
    assert others and not any(others)
    assert all(n == 1 for n in after_looks)


@pytest.mark.parametrize("name", ["sam_k", "look_sam", "look_layer_sam"])
def test_adaptive_looks_read_one_number_of_two_steps_before(monkeypatch, name):
    """Also before and after the window; after a look, whether that was skipped, as without."""
    ages = []

    class Dated(Later):
        def __init__(self, value) -> None:
            super().__init__(value)
            self.step = now

        def read(self):
            ages.append(now - self.step)
            return super().read()

    monkeypatch.setattr(when, "Later", Dated)
    engine = engine_of(name, "adamw", 4, looks="adaptive", look_from=6, look_until=22)
    before, looks = False, 0
    for now in range(26):
        ages.clear()
        batches = small.micro_batches(now, dtype=torch.float32)
        with Reads() as reads:
            look = engine.step(batches).look
        assert ages == ([2] if now >= 2 else [])
        asked = before and not look and now < 22
        assert reads.count == len(ages) + asked or now == 0  # Adam's first step may read
        before, looks = look, looks + look
    assert 3 <= looks <= 6


def test_a_value_for_later_can_be_read_copied_and_tested():
    yes, no = Later(torch.tensor(True)), Later(torch.tensor(False))
    assert yes and not no and copy.deepcopy(yes)
    assert Later(torch.tensor([0.5, 0.0])).read().tolist() == [0.5, 0.0]
