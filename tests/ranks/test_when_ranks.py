"""Windows of looks and adaptive looks on several ranks: the reference's steps, exact resumes."""

import json
from functools import partial

import cases
import pytest
import task
import torch
from safetensors.torch import load_file

from launch import play_train

RULES = [
    {"look_from": 5, "look_until": 13},
    {"looks": "adaptive"},
    {"looks": "adaptive", "look_from": 4, "look_until": 16},
]
NAMES = ("sam_k", "look_sam", "look_layer_sam")
DDP = {2: [{"optimizer": o, "rule": r} for o in NAMES for r in RULES]}
UNLIKE = [{"kind": "unlike", "optimizer": o, "rule": {"looks": "adaptive"}} for o in NAMES[:2]]
ZERO = {2: [{**case, "stage": stage} for case in DDP[2] for stage in (1, 3)]}


DDP[2] += UNLIKE


@pytest.fixture(scope="session")
def ddp(tmp_path_factory):
    return cases.results(tmp_path_factory.mktemp, "ddp_worker.py", DDP)


@pytest.fixture(scope="session")
def zero(tmp_path_factory):
    return cases.results(tmp_path_factory.mktemp, "zero_worker.py", ZERO)


def check(case, got):
    name = case["optimizer"]
    want = task.truth(name, **case["rule"])
    cases.assert_course(got["rows"], want.records)
    assert task.worst(got["weights"], want) < task.tolerance(name, None)


@pytest.mark.parametrize("ranks, number", cases.everywhere(DDP, DDP[2][: -len(UNLIKE)]))
def test_ranks_of_ddp_look_where_the_reference_looks(ddp, ranks, number):
    got = ddp(ranks, number)
    check(DDP[ranks][number], got)
    assert got["same"]


@pytest.mark.parametrize("ranks, number", cases.everywhere(DDP, UNLIKE))
def test_ranks_that_round_differently_decide_alike_and_send_one_message_as_before(
    ddp, ranks, number
):
    """Each rank of DDP computed ||g|| by itself; with devices of two kinds one could look alone,
    and the others would have waited for ever."""
    got = ddp(ranks, number)
    assert got["same"] and got["looks"] > 3 and got["small"] == 1


@pytest.mark.needs("deepspeed")
@pytest.mark.parametrize("ranks, number", cases.everywhere(ZERO, ZERO[2]))
def test_ranks_of_zero_look_where_the_reference_looks(zero, ranks, number):
    case, got = ZERO[ranks][number], zero(ranks, number)
    check(case, got)
    kept = case["optimizer"] != "sam_k" and "look_until" not in case["rule"]
    assert [size > 0 for size in got["gv_bytes"]] == [kept] * ranks


STEPS, DONE = 20, 7
FLAGS = ["--data", "digits", "--steps", str(STEPS), "--batch_size", "24", "--k", "3"]
FLAGS += ["--micro_batch", "12", "--optimizer", "look_sam", "--base", "sgd", "--save_every", "1"]
SETTINGS = {
    "window": ["--look_from", "0.2", "--look_until", "16", "--rho_schedule", "linear"],
    "adaptive": ["--looks", "adaptive", "--rho_schedule", "lr", "--rho_end", "2"],
}
WAYS = {
    "ddp": ["--backend", "ddp"],
    "zero1": ["--backend", "zero", "--zero_stage", "1"],
    "zero3": ["--backend", "zero", "--zero_stage", "3"],
    "fsdp2": ["--backend", "fsdp2"],
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Each setting: unbroken on 1 rank and on 2 of each backend; from 7 steps of itself, and of 1
    rank."""
    folder = tmp_path_factory.mktemp("when")

    def checkpoint(run):
        return ["--resume", str(folder / run / "checkpoints" / f"step-{DONE}")]

    plain = [[*FLAGS, *how, "--out", str(folder / f"{name}-plain")]
             for name, how in SETTINGS.items()]  # fmt: skip
    play_train(folder, 1, plain, 1400)
    several = []
    for name, how in SETTINGS.items():
        for way, backend in WAYS.items():
            flags, out = [*FLAGS, *how, *backend, "--out"], str(folder / f"{name}-{way}")
            several += [
                [*flags, out],
                [*flags, f"{out}-own", *checkpoint(f"{name}-{way}")],
                [*flags, f"{out}-other", *checkpoint(f"{name}-plain")],
            ]
    play_train(folder, 2, several, 1400)
    return folder


def looks(run, begin=0):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["rho"]) for r in rows if r.get("look") and r["step"] >= begin]


def worst(run, other):
    a, b = (load_file(path / "model.safetensors") for path in (run, other))
    return max(float((a[n] - b[n]).abs().max()) for n in b)


@pytest.mark.needs("deepspeed")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_looks_where_the_unbroken_one_looks(runs, way, name):
    """On every backend from its own checkpoint, to the bit, and from that of one plain rank."""
    here = partial("{}-{}-{}".format, name, way)
    whole, plain = runs / f"{name}-{way}", runs / f"{name}-plain"
    assert looks(whole) == looks(plain) and len(looks(whole)) > 3
    own, other = runs / here("own"), runs / here("other")
    assert looks(own) == looks(other) == looks(plain, DONE)
    weights = [load_file(path / "model.safetensors") for path in (own, whole)]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[1])
    assert worst(other, plain) < 1e-6 and worst(whole, plain) < 1e-6
