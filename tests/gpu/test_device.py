"""What a step does on a GPU alone: no wait of the host, the device's random numbers, overflow."""

import pytest
import torch
from torch import nn

from dist_looksam import Engine
from dist_looksam.optim import table
from dist_looksam.record.metrics import MetricsLog
from dist_looksam.run import fit
from dist_looksam.run.train import main

pytestmark = pytest.mark.needs("cuda")


class Net(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 32), nn.GELU(), nn.Dropout(drop), nn.LayerNorm(32), nn.Linear(32, 4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def engine_of(name: str, precision: str = "fp32", *, drop: float = 0.0, loss=None, k=5) -> Engine:
    torch.manual_seed(0)
    model = Net(drop).cuda()
    base = table.build_base(table.base_of(name, None), table.groups(model, 0.1), lr=0.01)
    row = table.method(name)
    rule = table.rule_of(name, k=k if row.settable_k else 1)
    optimizer = table.build(base, rule=rule, rho=0.05, alpha=0.5)
    return Engine(model, optimizer, loss or loss_of, precision=precision)


def loss_of(model: nn.Module, batch: tuple) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def batches(number: int, count: int = 2) -> list[tuple]:
    draw = torch.Generator().manual_seed(number)
    return [
        (torch.randn(8, 16, generator=draw).cuda(), torch.randint(4, (8,), generator=draw).cuda())
        for _ in range(count)
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd", "look_sam", "look_layer_sam"])
def test_no_step_between_looks_waits_for_the_device(name, precision):
    """torch raises where the host would wait. The first step after a look reads its flag."""
    engine = engine_of(name, precision, drop=0.1)
    for step in range(7):  # 0 and 5 look
        engine.step(batches(step))
    later = [batches(step) for step in (7, 8, 9)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        looks = [engine.step(of_step).look for of_step in later]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(looks)


def test_the_training_loop_waits_for_nothing_between_looks(monkeypatch, tmp_path):
    """It waited in every step: its flags went to the device from memory that is not page-locked,
    and were read behind the next step's work."""
    step_of, quiet = fit.Fit._step, []

    def step(self, number: int) -> None:
        if number >= 5 and number % 5 > 1:  # 1: reads whether the look before was skipped
            quiet.append(number)
            torch.cuda.set_sync_debug_mode("error")
        else:
            torch.cuda.set_sync_debug_mode("default")
        step_of(self, number)

    monkeypatch.setattr(fit.Fit, "_step", step)
    monkeypatch.setitem(MetricsLog.__init__.__kwdefaults__, "seconds", 1e9)  # reads every 50 steps
    flags = (
        "--data digits --steps 12 --k 5 --optimizer look_layer_sam --eval_every 100 --batch_size"
    )
    try:
        assert main([*flags.split(), "64", "--device", "cuda", "--out", str(tmp_path / "run")]) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert quiet == [7, 8, 9]


@pytest.mark.parametrize("name", ["adamw", "look_sam", "look_layer_sam"])
def test_a_step_leaves_the_devices_random_numbers_as_one_pass_does(name):
    engine = engine_of(name, drop=0.5)
    engine.step(batches(0))
    after = torch.cuda.get_rng_state()
    plain = engine_of("sgd", drop=0.5)
    plain.step(batches(0))
    assert torch.equal(after, torch.cuda.get_rng_state())


def test_both_passes_of_every_micro_batch_drop_the_same_entries():
    masks: list[torch.Tensor] = []

    def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
        masks.append(nn.functional.dropout(torch.ones(64, device="cuda"), 0.5))
        return loss_of(model, batch) + masks[-1].sum() * 0.0

    engine_of("sam", loss=loss).step(batches(0, count=3))
    assert len(masks) == 6
    assert all(map(torch.equal, masks[:3], masks[3:]))
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("bad", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["look_sam", "look_layer_sam"])
def test_a_pass_that_is_not_finite_changes_no_bit_of_the_run(name, precision, bad):
    calls = {"left": -1}

    def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
        calls["left"] -= 1
        value = loss_of(model, batch)
        return value * float("nan") if calls["left"] == 0 else value

    engine = engine_of(name, precision, loss=loss, k=2)
    for step in range(2):
        engine.step(batches(step, count=1))
    kept = [p.detach().clone() for p in engine.module.parameters()]
    state = [v.clone() for s in engine.optimizer.state.values() for v in s.values()]
    scaler = engine.backend.scaler
    scale = scaler.scale if scaler else None
    calls["left"] = bad
    done = engine.step(batches(2, count=1))
    assert done.look and not bool(done.seen.finite)
    now = [v for s in engine.optimizer.state.values() for v in s.values()]
    assert all(map(torch.equal, kept, engine.module.parameters()))
    assert all(map(torch.equal, state, now))
    if scaler:
        assert scaler.scale == scale / 2
    again = engine.step(batches(3, count=1))
    assert again.look and bool(again.seen.finite)


def test_the_device_trains_to_what_the_cpu_does():
    """All methods, with fp32 arithmetic of the same order of size; rounding alone differs."""
    for name in table.METHODS:
        base = table.base_of(name, None)
        found = []
        for device in ("cuda", "cpu"):
            torch.manual_seed(0)
            model = Net().to(device)
            inner = table.build_base(base, table.groups(model, 0.1), lr=0.01, eps=1e-4)
            row = table.method(name)
            rule = table.rule_of(name, k=3 if row.settable_k else 1)
            engine = Engine(model, table.build(inner, rule=rule, rho=0.05, alpha=0.5), loss_of)
            for step in range(7):
                engine.step([tuple(t.to(device) for t in b) for b in batches(step)])
            found.append([p.detach().cpu() for p in model.parameters()])
        worst = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
        assert worst < 2e-5, f"{name}: {worst}"
