"""What a checkpoint holds comes back, bit for bit, on one rank."""

import pytest
import small
import torch
from torch import nn

from dist_looksam import Engine
from dist_looksam.backends.plain import Plain
from dist_looksam.checkpoint import restore, save
from dist_looksam.optim.table import BASES, METHODS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, base", [(n, b) for n, m in METHODS.items() for b in BASES
                                        if m.ascent or m.base == b])  # fmt: skip
def test_every_optimizer_goes_on_bit_for_bit_in_mid_cycle(name, base, dtype, tmp_path):
    """float64 once came back rounded to float32."""

    def fresh():
        return small.engine(small.net(dtype=dtype), name, base, k=5)

    whole, first, second = fresh(), fresh(), fresh()
    for t in range(13):
        whole.step(small.micro_batches(t, dtype=dtype))
    for t in range(7):
        first.step(small.micro_batches(t, dtype=dtype))
    save(first, tmp_path)
    restore(second, tmp_path)
    for t in range(7, 13):
        second.step(small.micro_batches(t, dtype=dtype))
    for p, q in zip(whole.module.parameters(), second.module.parameters(), strict=True):
        assert p.dtype == dtype and torch.equal(p, q)


def _with_statistics():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def _loss(model, pair):
    return nn.functional.cross_entropy(model(pair[0]), pair[1])


def _batches(t):
    draw = torch.Generator().manual_seed(t)
    return [(torch.randn(16, 6, generator=draw), torch.randint(0, 3, (16,), generator=draw))]


def test_running_statistics_and_frozen_layers_come_back(tmp_path):
    """Neither is trained, so neither is a layer: both were lost, and accuracy with them."""

    def fresh(frozen):
        model = _with_statistics()
        with torch.no_grad():
            model[0].bias.fill_(frozen)
        model[0].bias.requires_grad_(False)
        params = [p for p in model.parameters() if p.requires_grad]
        return Engine(model, torch.optim.SGD(params, lr=0.1), _loss)

    first, second = fresh(0.5), fresh(0.0)
    for t in range(4):
        first.step(_batches(t))
    save(first, tmp_path)
    restore(second, tmp_path)
    want, got = first.module.state_dict(), second.module.state_dict()
    assert int(got["1.num_batches_tracked"]) == 4
    for name in want:
        assert torch.equal(want[name], got[name]), name


def test_every_layer_has_its_own_number_of_adam_steps(tmp_path):
    """A layer that joined later once got the steps of the oldest one."""

    def fresh():
        model = nn.ModuleDict({"old": nn.Linear(6, 3), "new": nn.Linear(6, 3)})
        return Engine(model, torch.optim.AdamW(model.parameters(), lr=0.1), loss)

    def loss(model, pair):
        out = model["old"](pair[0]) + (model["new"](pair[0]) if joined else 0)
        return nn.functional.cross_entropy(out, pair[1])

    first, joined = fresh(), False
    for t in range(3):
        first.step(_batches(t))
    joined = True
    first.step(_batches(3))
    save(first, tmp_path)
    second = fresh()
    restore(second, tmp_path)
    steps = {n: float(second.optimizer.state[p]["step"])
             for n, p in second.module.named_parameters()}  # fmt: skip
    assert steps == {"old.weight": 4, "old.bias": 4, "new.weight": 1, "new.bias": 1}


def test_the_loss_scale_and_an_owed_look_come_back(tmp_path):
    backends = []
    for _ in range(2):
        optimizer = small.engine(model := small.net(), "look_sam").optimizer
        backends.append(Plain(model, optimizer, precision="fp16"))
    first, second = (Engine(b, loss=small.loss) for b in backends)
    backends[0].scaler.scale, backends[0].scaler.good_steps = 256.0, 17
    first.optimizer.record_look(torch.tensor(False))
    first.optimizer.steps = 3
    save(first, tmp_path)
    restore(second, tmp_path)
    assert (backends[1].scaler.scale, backends[1].scaler.good_steps) == (256.0, 17)
    assert second.optimizer.looks() and second.optimizer.steps == 3


def test_a_checkpoint_without_gv_looks_on_its_first_step(tmp_path):
    first, second = (small.engine(small.net(), "look_sam", k=5) for _ in range(2))
    first.step(small.micro_batches(0))
    for state in first.optimizer.state.values():
        del state["g_v"]
    save(first, tmp_path)
    restore(second, tmp_path)
    assert second.step(small.micro_batches(1)).look
    assert not second.step(small.micro_batches(2)).look


def test_a_loaded_checkpoint_wins_over_counters_that_wait_in_the_groups(tmp_path):
    """A universal checkpoint was loaded first: its counters came back at the next step. And a
    save between the two held the counters from before."""
    first, second = (small.engine(small.net(), "look_sam", k=5) for _ in range(2))
    for t in range(3):
        first.step(small.micro_batches(t))
    save(first, tmp_path)
    for group in second.optimizer.param_groups:
        group["sharpness"] = {"steps": 10, "owed": True}
    counters = second.backend.counters()
    assert (counters["steps"], counters["owed"]) == (10, True)
    for group in second.optimizer.param_groups:
        group["sharpness"] = {"steps": 10, "owed": True}
    restore(second, tmp_path)
    assert not second.optimizer.looks() and second.optimizer.steps == 3
