"""Windows of looks and adaptive looks on several ranks: the reference's steps, exact resumes."""

import json
from functools import partial

import cases
import pytest
import task
import torch
from safetensors.torch import load_file

from launch import play_train_by_horovod, play_trains

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


STEPS, DONE = 14, 5
FLAGS = ["--data", "digits", "--steps", str(STEPS), "--batch_size", "24", "--k", "3"]
FLAGS += ["--micro_batch", "12", "--optimizer", "look_sam", "--base", "sgd"]
FLAGS += ["--save_every", str(DONE)]
SETTINGS = {  # run/test_when_run.py has them one by one, on 1 rank
    "adaptive": ["--look_from", "0.2", "--look_until", "13", "--looks", "adaptive",
                 "--rho_schedule", "lr", "--rho_end", "2"],
}  # fmt: skip
WAYS = {
    "ddp": ["--backend", "ddp"],
    **{f"zero{s}": ["--backend", "zero", "--zero_stage", str(s)] for s in range(4)},
    "fsdp2": ["--backend", "fsdp2"],
}
HOROVOD = {
    "horovod": ["--backend", "horovod"],
    "horovod1": ["--backend", "horovod", "--zero_stage", "1"],
}


def flags_of(folder, name, way, backend):
    """A setting on a backend: unbroken, from its own checkpoint, and from that of 1 rank."""
    flags, out = [*FLAGS, *SETTINGS[name], *backend, "--out"], str(folder / f"{name}-{way}")
    begins = (
        str(folder / f"{name}-{of}" / "checkpoints" / f"step-{DONE}") for of in (way, "plain")
    )
    own, other = begins
    return [
        [*flags, out],
        [*flags, f"{out}-own", "--resume", own],
        [*flags, f"{out}-other", "--resume", other],
    ]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Each setting unbroken on 1 rank, and as of `flags_of` on 2 of each backend."""
    folder = tmp_path_factory.mktemp("when")
    plain = [flags_of(folder, name, "plain", [])[0] for name in SETTINGS]
    several = [
        flags
        for name in SETTINGS
        for way, backend in WAYS.items()
        for flags in flags_of(folder, name, way, backend)
    ]
    play_trains(folder, {1: plain, 2: several}, 1400)
    return folder


@pytest.fixture(scope="session")
def by_horovod(runs):
    of_all = [(name, *way) for name in SETTINGS for way in HOROVOD.items()]
    play_train_by_horovod(runs, 2, [flags for how in of_all for flags in flags_of(runs, *how)])
    return runs


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
    goes_on(runs, way, name)


@pytest.mark.needs("horovod", "deepspeed")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("way", HOROVOD)
def test_so_does_a_resumed_run_of_horovod(by_horovod, way, name):
    goes_on(by_horovod, way, name)


def goes_on(runs, way, name):
    here = partial("{}-{}-{}".format, name, way)
    whole, plain = runs / f"{name}-{way}", runs / f"{name}-plain"
    assert looks(whole) == looks(plain) and len(looks(whole)) >= 3
    own, other = runs / here("own"), runs / here("other")
    assert looks(own) == looks(other) == looks(plain, DONE)
    weights = [load_file(path / "model.safetensors") for path in (own, whole)]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[1])
    assert worst(other, plain) < 1e-6 and worst(whole, plain) < 1e-6
