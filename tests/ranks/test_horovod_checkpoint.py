"""Checkpoints written under Horovod are read under DDP and ZeRO, and theirs under Horovod."""

import json
import os
import sys

import pytest
import task
import torch

from dist_looksam.checkpoint import Reader
from launch import HERE, run

pytestmark = pytest.mark.needs("horovod", "deepspeed")

WRITTEN, STEPS = 7, 13  # with k = 3 a checkpoint at 7 is in mid-cycle: g_v is needed at 7 and 8
RANKS = (1, 2, 3)
HOROVOD = ("horovod", "sharded")  # and what it is at zero_stage 1
OTHERS = ("ddp", "zero0", "zero1", "zero2", "zero3")
SGD = {"optimizer": "look_sam", "base": "sgd"}
LAMB = {"optimizer": "look_layer_sam", "base": "lamb"}
EVERY = [(a, r, b, s) for a in HOROVOD for r in RANKS for b in (*HOROVOD, *OTHERS) for s in RANKS]
EVERY += [(b, s, a, r) for a, r, b, s in EVERY if b in OTHERS]


def chosen(turn: tuple[str, int, str, int]) -> bool:
    """A third: every pair of backends with every number of ranks on either side.

    With FULL_MATRIX=1 all of it.
    """
    names = (*HOROVOD, *OTHERS)
    written_on, written_by, read_on, read_by = turn
    shift = names.index(written_on) + names.index(read_on)
    return os.environ.get("FULL_MATRIX") == "1" or (written_by + read_by + shift) % 3 == 0


TURNS = [turn for turn in EVERY if chosen(turn)]


def result_of(folder, turn: tuple[str, int, str, int]):
    return folder / "{}-{}-to-{}-{}.pt".format(*turn)


EMPTY = {"read": None, "write": None, "result": None}


def writing(folder, ranks: int) -> list[dict]:
    """The jobs that write, and for the last test one that is not interrupted."""
    jobs = []
    for on in (*HOROVOD, *OTHERS):
        write = {"write": str(folder / f"{on}-{ranks}"), "steps": WRITTEN}
        jobs.append({**EMPTY, **SGD, "on": on, **write})
    for on in HOROVOD if ranks == 2 else ():
        write = {"write": str(folder / f"lamb-{on}"), "steps": WRITTEN}
        whole = {"result": str(folder / f"lamb-{on}-whole.pt"), "steps": STEPS}
        jobs += [{**EMPTY, **LAMB, "on": on, **more} for more in (write, whole)]
    return jobs


def reading(folder, ranks: int) -> list[dict]:
    jobs = []
    for turn in TURNS:
        written_on, written_by, on, read_by = turn
        read = str(folder / f"{written_on}-{written_by}" / f"step-{WRITTEN}")
        job = {**EMPTY, **SGD, "on": on, "read": read, "steps": STEPS}
        if read_by == ranks:
            jobs.append({**job, "result": str(result_of(folder, turn))})
    for on in HOROVOD if ranks == 2 else ():
        read = str(folder / f"lamb-{on}" / f"step-{WRITTEN}")
        job = {**EMPTY, **LAMB, "on": on, "read": read, "steps": STEPS}
        jobs.append({**job, "result": str(folder / f"lamb-{on}-resumed.pt")})
    return jobs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All checkpoints, then all continuations: five starts of ranks, forked by one process."""
    folder = tmp_path_factory.mktemp("matrix")
    turns = [
        (2, [writing]),
        (3, [writing]),
        (1, [writing, reading]),
        (2, [reading]),
        (3, [reading]),
    ]
    starts = [
        (ranks, [job for kind in kinds for job in kind(folder, ranks)]) for ranks, kinds in turns
    ]
    (folder / "starts.json").write_text(json.dumps(starts))
    run([sys.executable, str(HERE / "horovod_checkpoint_worker.py"), str(folder)], 1400, {})
    return folder


@pytest.mark.parametrize("turn", TURNS, ids=lambda turn: "{}-{}-to-{}-{}".format(*turn))
def test_horovod_and_the_others_go_on_from_one_another(folder, turn):
    got = torch.load(result_of(folder, turn), weights_only=True)
    truth = task.truth("look_sam", "sgd", steps=STEPS)
    assert got["looks"] == [r["look"] for r in truth.records[WRITTEN:]]
    assert task.worst(got["weights"], truth) < 1e-6


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("on", HOROVOD)
def test_gv_in_horovods_checkpoint_is_that_of_one_process(folder, ranks, on):
    """By value: a lost or shuffled g_v still trains, and its weights are not far off."""
    mine = Reader(folder / f"{on}-{ranks}" / f"step-{WRITTEN}")
    one = Reader(folder / "ddp-1" / f"step-{WRITTEN}")
    assert mine.keys == one.keys == ["g_v", "momentum_buffer"]
    for name, p in task.net().named_parameters():
        for key in ("weight", *mine.keys):
            got, want = (r(name, key, 0, p.numel()) for r in (mine, one))
            assert float((got - want).abs().max()) < 1e-6, (name, key)
            assert key != "g_v" or float(want.abs().sum()) > 0


@pytest.mark.parametrize("on", HOROVOD)
def test_the_same_two_ranks_go_on_bit_for_bit(folder, on):
    resumed, whole = (
        torch.load(folder / f"lamb-{on}-{which}.pt", weights_only=True)["weights"]
        for which in ("resumed", "whole")
    )
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
