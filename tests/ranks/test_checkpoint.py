"""Any to any: written by R ranks of one backend, read by R' ranks of another."""

import json
from itertools import product

import pytest
import task
import torch

from dist_looksam.checkpoint import Reader
from launch import torchrun

pytestmark = pytest.mark.needs("deepspeed")

WRITTEN, STEPS = 7, 13  # with k = 3 a checkpoint at 7 is in mid-cycle: g_v is needed at 7 and 8
RANKS = (1, 2, 3)
BACKENDS = ("ddp", 0, 1, 2, 3)
CASE = {"optimizer": "look_sam", "base": "sgd"}
ADAM = {"optimizer": "look_layer_sam", "base": "adamw"}
# A short form of the matrix: every number of ranks with every backend on both sides, once.
TURNS = [
    (r, b, BACKENDS[(i + 2 * j + 1) % 5], RANKS[(j + i + 1) % len(RANKS)])
    for j, r in enumerate(RANKS)
    for i, b in enumerate(BACKENDS)
]


def play(folder, ranks: int, jobs: list[dict]) -> None:
    (folder / f"jobs-{ranks}.json").write_text(json.dumps(jobs))
    torchrun(ranks, "checkpoint_worker.py", folder / f"jobs-{ranks}.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All checkpoints, then all continuations: eight starts of ranks."""
    folder = tmp_path_factory.mktemp("matrix")
    for ranks in RANKS:
        jobs = []
        for backend, (name, case) in product(BACKENDS, (("sgd", CASE), ("adam", ADAM))):
            if name == "adam" and ranks != 2:
                continue
            write = str(folder / f"{name}-{ranks}-{backend}")
            job = {**case, "backend": backend, "start": 0, "steps": WRITTEN, "read": None}
            jobs.append({**job, "write": write, "result": None})
            if ranks == 2 and name == "adam":
                uninterrupted = {"write": None, "steps": STEPS}
                jobs.append({**job, **uninterrupted, "result": f"{write}-whole.pt"})
        play(folder, ranks, jobs)
    for ranks in RANKS:
        jobs = []
        for written_by, backend, reads, readers in TURNS:
            if readers == ranks:
                jobs.append(_on(folder, CASE, f"sgd-{written_by}-{backend}", reads))
        for backend in BACKENDS if ranks == 2 else ():
            jobs.append(_on(folder, ADAM, f"adam-2-{backend}", backend))
        play(folder, ranks, jobs)
    return folder


def _on(folder, case: dict, name: str, backend) -> dict:
    read = str(folder / name / f"step-{WRITTEN}")
    result = str(folder / f"{name}-to-{backend}.pt")
    job = {**case, "backend": backend, "start": WRITTEN, "steps": STEPS, "read": read}
    return {**job, "write": None, "result": result}


@pytest.mark.parametrize("written_by, backend, reads, readers", TURNS)
def test_any_ranks_and_backend_go_on_from_any_other(folder, written_by, backend, reads, readers):
    got = torch.load(folder / f"sgd-{written_by}-{backend}-to-{reads}.pt", weights_only=True)
    truth = task.truth("look_sam", "sgd", steps=STEPS)
    assert got["looks"] == [r["look"] for r in truth.records[WRITTEN:]]
    assert task.worst(got["weights"], truth) < 1e-6


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gv_in_a_checkpoint_is_that_of_one_rank(folder, ranks, backend):
    """By value: a lost or shuffled g_v still trains, and its weights are not far off."""
    mine = Reader(folder / f"sgd-{ranks}-{backend}" / f"step-{WRITTEN}")
    one = Reader(folder / "sgd-1-ddp" / f"step-{WRITTEN}")
    assert mine.keys == one.keys == ["g_v", "momentum_buffer"]
    for name, p in task.net().named_parameters():
        for key in ("weight", *mine.keys):
            got, want = (r(name, key, 0, p.numel()) for r in (mine, one))
            assert float((got - want).abs().max()) < 1e-6, (name, key)
            assert key != "g_v" or float(want.abs().sum()) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_ranks_and_backend_go_on_as_if_never_interrupted(folder, backend):
    """Not always bit for bit on a CPU: seen to differ at DDP and stage 2, cause not yet found."""
    got = torch.load(folder / f"adam-2-{backend}-to-{backend}.pt", weights_only=True)
    want = torch.load(folder / f"adam-2-{backend}-whole.pt", weights_only=True)
    for name, weight in want["weights"].items():
        assert float((got["weights"][name] - weight).abs().max()) < 2e-5, name
