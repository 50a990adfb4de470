"""On a GPU: every optimizer and backend against the truth, overflow, random numbers, train.py.

One rank over NCCL; two over NCCL where there are two GPUs, else two that share one over gloo.
"""

import json
import math
import shutil
import sys
from functools import partial

import cases
import ddp_worker
import pytest
import task
import torch
from campaign import metrics
from safetensors.torch import load_file
from torch import nn

from dist_looksam import Engine
from dist_looksam.optim import table
from dist_looksam.record.metrics import MetricsLog, read
from launch import HERE, run

pytestmark = pytest.mark.needs("cuda")

TABLE = [{"optimizer": o} for o in task.OPTIMIZERS]
TABLE += [{"optimizer": o, "base": "sgd"} for o in ("sam", "look_sam", "look_layer_sam")]
STAGED = [{**case, "stage": stage} for case in TABLE for stage in (0, 1, 2, 3)]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
STAGED += [
    {"optimizer": "look_layer_sam", "stage": s, "zero": z}
    for s in (2, 3)
    for z in (OFFLOAD, {"overlap_comm": True, "reduce_bucket_size": 30})
]
CASES = {
    "ddp": {1: TABLE, 2: TABLE},
    "fsdp": {1: TABLE},
    "zero": {1: STAGED},
}
OVERFLOWS = {
    "fsdp": [
        {"kind": "overflow", "optimizer": "look_layer_sam", "overflow": n, **p}
        for p in ({}, {"precision": "bf16"}, {"precision": "fp16"})
        for n in (1, 2)
    ],
    "zero_overflow": [
        {"optimizer": "look_layer_sam", "stage": s, "precision": p, "bad_pass": n}
        for s in (0, 1, 2, 3)
        for p in ("fp32", "bf16", "fp16")
        for n in (1, 2)
        if s or p == "fp32"
    ],
}


def played(make_folder, by_worker: dict):
    """(worker, ranks, number) -> what came out."""
    start = partial(cases.results, make_folder, timeout=500, **cases.ON_GPU)
    found = {worker: start(f"{worker}_worker.py", of) for worker, of in by_worker.items()}
    return lambda worker, *which: found[worker](*which)


@pytest.fixture(scope="session")
def result(tmp_path_factory):
    return played(tmp_path_factory.mktemp, CASES)


@pytest.fixture(scope="session")
def spoilt(tmp_path_factory):
    """Of steps that overflowed, on one rank."""
    return played(tmp_path_factory.mktemp, {worker: {1: of} for worker, of in OVERFLOWS.items()})


@pytest.mark.parametrize("worker, ranks, number", [
    pytest.param(worker, ranks, n, id="-".join([worker, str(ranks), json.dumps(case)]))
    for worker, by_ranks in CASES.items()
    for ranks, of_ranks in by_ranks.items()
    for n, case in enumerate(of_ranks)
])  # fmt: skip
def test_a_gpu_trains_to_the_weights_of_the_reference(result, worker, ranks, number):
    case, got = CASES[worker][ranks][number], result(worker, ranks, number)
    name, base = case["optimizer"], case.get("base")
    want = task.truth(name, base)
    assert task.worst(got["weights"], want) < task.tolerance(name, base)
    cases.assert_course(got["rows"], want.records)


@pytest.mark.parametrize("number", range(len(OVERFLOWS["fsdp"])))
def test_an_overflow_under_fsdp2_changes_no_bit(spoilt, number):
    case = OVERFLOWS["fsdp"][number]
    for kept, skipped, looks, finite, scale in spoilt("fsdp", 1, number)["everyone"]:
        assert kept and skipped and looks and finite
        assert scale == (2.0**15 if case.get("precision") == "fp16" else None)


@pytest.mark.parametrize("number", range(len(OVERFLOWS["zero_overflow"])))
def test_an_overflow_under_deepspeed_changes_no_bit(spoilt, number):
    case = OVERFLOWS["zero_overflow"][number]
    for rank in spoilt("zero_overflow", 1, number):
        assert not rank["finite"] and rank["changed"] == [] and all(rank["moved"])
        assert rank["looks"][3] and rank["looks"][4], "the next step must look again"
        before, after = rank["scales"]
        assert after == (before / 2 if case["precision"] == "fp16" else before)
        assert case["precision"] != "fp32" or not any(now for now, _ in rank["reads"][1:])


@pytest.fixture
def engine_of(monkeypatch):
    """The DDP tests' engine in this process, on the GPU; task.part as well."""
    monkeypatch.setattr(task, "DEVICE", "cuda")
    return ddp_worker.engine_of


def part(step: int) -> list:
    return task.part(step, 0, 1, 1)


@pytest.mark.parametrize("bad", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("base", ["adamw", "sgd", "lamb", "lars"])
def test_a_base_skips_on_the_device(engine_of, base, precision, bad):
    """Of all that is kept between steps no bit changes."""
    loss = ddp_worker.Spoilt(2 + 1 + 1 + bad)
    engine = engine_of({"optimizer": "look_sam", "base": base, "precision": precision}, loss)
    for step in range(3):
        engine.step(part(step))

    def held() -> list[torch.Tensor]:
        kept = [v for state in engine.optimizer.state.values() for v in state.values()]
        return [t.clone() for t in [*engine.module.parameters(), *kept]]

    before = held()
    assert not bool(engine.step(part(3)).seen.finite)
    assert all(map(torch.equal, before, held()))
    again = engine.step(part(4))
    assert again.look and bool(again.seen.finite)


def test_both_passes_of_a_look_drop_the_same_entries_on_the_device():
    torch.manual_seed(0)
    masks: list[torch.Tensor] = []

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = nn.functional.dropout(torch.ones_like(x), 0.5)
            masks.append(kept)
            return (x * kept * self.weight).sum(-1)

    model = Dropping().cuda()
    base = table.build_base("sgd", [{"params": [model.weight], "weight_decay": 0.0}], lr=0.1, eps=0)
    optimizer = table.build(base, rule=table.rule_of("sam", k=1), rho=0.05, alpha=0.5)
    engine = Engine(model, optimizer, lambda m, x: m(x).square().mean())
    for _ in range(2):
        engine.step([torch.ones(8, 64, device="cuda")])
    first, again, later, _ = masks
    assert torch.equal(first, again) and not torch.equal(first, later)


@pytest.mark.parametrize("optimizer", ["look_sam", "look_layer_sam"])
def test_a_reuse_step_does_not_wait_for_the_device(engine_of, optimizer):
    """torch raises where the host would. The first after a look reads whether that was skipped."""
    engine = engine_of({"optimizer": optimizer})
    for step in range(5):
        engine.step(part(step))
    batch = part(5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        looked = engine.step(batch).look
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not looked


WAYS = {
    "plain": ["--backend", "plain"],
    "ddp": ["--backend", "ddp"],
    **{f"zero{s}": ["--backend", "zero", "--zero_stage", str(s)] for s in (0, 1, 2, 3)},
    "fsdp2": ["--backend", "fsdp2"],
}
STEPS = 30
FLAGS = ["--device", "cuda", "--data", "digits", "--batch_size", "64", "--micro_batch", "32"]
FLAGS += ["--lr", "0.005", "--steps", str(STEPS), "--k", "3", "--drop_path", "0.1"]
FLAGS += ["--augment", "crop,mixup", "--clip", "1", "--save_every", "10"]


def train(way: str, *flags: str) -> None:
    """train.py on one GPU, by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += [str(HERE.parents[1] / "train.py"), *FLAGS, *WAYS[way], *flags]
    run(command, 400, cases.ON_GPU)


@pytest.mark.parametrize("way, precision", [
    (way, precision) for way in WAYS for precision in ("fp32", "bf16", "fp16")
    if way != "zero0" or precision == "fp32"
])  # fmt: skip
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(way, precision, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(way, "--precision", precision, "--out", str(whole))
    (broken / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step-10", broken / "checkpoints" / "step-10")
    shutil.copy(whole / "config.yaml", broken)
    train(way, "--precision", precision, "--out", str(broken), "--resume", "auto")
    mine, theirs = (load_file(p / "model.safetensors") for p in (broken, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    later = [row for row in metrics(whole) if row["step"] >= 10]
    assert len(later) >= STEPS - 10 and all(math.isfinite(row.get("loss", 0)) for row in later)
    assert [row for row in metrics(broken) if row["step"] >= 10] == later


@pytest.mark.parametrize("way", ["plain", "zero2", "fsdp2"])
def test_a_run_of_a_gpu_goes_on_without_one(way, tmp_path):
    """To what it would have been there, but for rounding."""
    out, sgd = tmp_path / "run", ("--optimizer", "look_sam", "--base", "sgd")
    train(way, *sgd, "--out", str(out))
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS}")
    for name in ("summary.json", "model.safetensors"):
        (out / name).rename(tmp_path / name)
    train("plain", *sgd, "--device", "cpu", "--out", str(out), "--resume", "auto")
    there, here = (load_file(p / "model.safetensors") for p in (tmp_path, out))
    assert max(float((there[n] - here[n]).abs().max()) for n in there) < 1e-5


@pytest.mark.needs("cuda")
def test_images_per_s_counts_what_the_gpu_takes_not_the_launch(tmp_path):
    """The clock stopped when a step was launched, and the wait for it came later."""
    device = torch.device("cuda")
    with MetricsLog(tmp_path / "metrics.jsonl", device=device) as log:
        for step in range(6):
            torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second, launched in no time
            log.step(step, images=100, loss=torch.zeros((), device=device))
    steps, _ = read(tmp_path / "metrics.jsonl")
    assert all(row["images_per_s"] < 100 / 0.05 for row in steps)
    assert steps[-1]["seconds"] == pytest.approx(
        sum(100 / row["images_per_s"] for row in steps), abs=0.01
    )
