"""A job that is out of time, or pre-empted: it goes on by itself, and ends bit for bit as one that
was left alone."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from testbed import Cluster, trains, until

pytestmark = [pytest.mark.needs("slurm", "deepspeed"), pytest.mark.timeout(1200)]

STEPS = 80
FLAGS = shlex.split(
    "--optimizer look_layer_sam --data digits --model vit_8 --augment none --batch_size 16 --k 3 "
    f"--backend zero --steps {STEPS} --eval_every 40"
)
TIMES = ("seconds", "images_per_s")


def rows(run: Path) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]


def assert_same(run: Path, other: Path) -> None:
    assert rows(run) == rows(other)
    mine, theirs = (load_file(p / "model.safetensors") for p in (run, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def unbroken(session_testbed, tmp_path_factory):
    """The run of the same job that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    job = session_testbed.train(*FLAGS, cwd=folder, nodes=2)
    assert session_testbed.wait(job, timeout=400) == "COMPLETED"
    return folder / "runs" / "r"


def slow(testbed: Cluster) -> None:
    """A cable so slow that a step takes half a second, whatever the machine."""
    testbed.fault("slow", "node2", "delay_ms=20", "jitter_ms=0", "loss=0")


def test_a_job_of_one_minute_requeues_itself_until_it_is_done(unbroken, testbed, tmp_path):
    """SLURM looks at limits twice a minute; so early a signal makes it end each life then.

    The first life is ended at its very start: a signal was lost where there was no step yet, or
    killed ranks that were still importing torch, or what starts them: here that takes 3 s.
    """
    slow(testbed)
    (tmp_path / "bin").mkdir()
    late = tmp_path / "bin" / "bash"
    late.write_text('#!/bin/sh\n[ "$SLURM_RESTART_COUNT" ] || sleep 3\nexec /bin/bash "$@"\n')
    late.chmod(0o755)
    limit = ("--time=1", "--signal=B:USR1@30")
    path = {"PATH": f"{late.parent}:/usr/sbin:/usr/bin:/sbin:/bin"}
    job = testbed.train(*FLAGS, cwd=tmp_path, nodes=2, options=limit, env=path)
    until(lambda: testbed.on("node1", "pgrep", "-f", "launch/rank.sh", check=False), 60)
    testbed.on("head", "scancel", "--signal=USR1", "--batch", job)
    output = tmp_path / f"slurm-{job}.out"
    until(lambda: testbed.told(job, "Restarts") == "2", 240, output.read_text)
    testbed.fault("fast", "node2")
    assert testbed.wait(job, timeout=400) == "COMPLETED"

    log = output.read_text()
    assert log.count("SIGUSR1 after step") == log.count("resumed from") >= 2
    row = testbed.shown(tmp_path, job)
    assert (row["state"], row["step"]) == ("finished", f"{STEPS}/{STEPS}")
    assert row["requeues"] == testbed.told(job, "Restarts")
    assert_same(tmp_path / "runs" / "r", unbroken)


def test_a_pre_empted_job_gives_way_and_goes_on_when_it_may(unbroken, testbed, tmp_path):
    """Ranks that are told to go exit with 0 in their time of grace. The job was then over, and
    SLURM requeues no job that is over. So it was with ranks ended while they import torch."""
    slow(testbed)
    where = ("--partition=spare", "--nodelist=node[1-2]", "--exclusive")
    first = ("--partition=urgent", "--nodelist=node1", "--exclusive", "--wrap=sleep 600")
    job = testbed.train(*FLAGS, cwd=tmp_path, nodes=2, options=where)
    until(lambda: testbed.on("node1", "pgrep", "-f", "launch/rank.sh", check=False), 60)
    urgent = testbed.submit(*first, cwd=tmp_path)
    until(lambda: testbed.told(job, "Restarts") == "1", 60, lambda: testbed.state(job))
    testbed.on("head", "scancel", urgent)

    trains(tmp_path / "runs" / "r")
    testbed.on("node2", "pkill", "-STOP", "slurmd")  # SIGTERM stays on its way to this node
    urgent = testbed.submit(*first, cwd=tmp_path)
    until(lambda: testbed.told(job, "Restarts") == "2", 60, lambda: testbed.state(job))
    testbed.on("node2", "pkill", "-CONT", "slurmd")
    assert testbed.wait(urgent, until={"RUNNING", "FAILED"}, timeout=120) == "RUNNING"
    row = testbed.shown_as("requeued", tmp_path, job, timeout=60)
    assert row["requeues"] == "2" and row["checkpoint"].startswith("step-")
    testbed.fault("fast", "node2")
    testbed.on("head", "scancel", urgent)
    assert testbed.wait(job, timeout=400) == "COMPLETED"

    log = (tmp_path / f"slurm-{job}.out").read_text()
    assert log.count("SIGTERM after step") == log.count("resumed from") == 1
    assert testbed.shown(tmp_path, job)["state"] == "finished"
    assert_same(tmp_path / "runs" / "r", unbroken)


def test_a_signal_that_nobody_knows_of_is_no_end(unbroken, testbed, tmp_path):
    """SLURM's SIGTERM of a pre-emption reached one node 20 s late, when the job had come back: its
    ranks saved and left, and the job was COMPLETED after 74 steps of 80."""
    slow(testbed)
    job = testbed.train(*FLAGS, cwd=tmp_path, nodes=2)
    trains(tmp_path / "runs" / "r")
    testbed.on("node2", "pkill", "-TERM", "--full", "train.py")
    until(lambda: testbed.told(job, "Restarts") == "1", 60, lambda: testbed.state(job))
    testbed.fault("fast", "node2")
    assert testbed.wait(job, timeout=400) == "COMPLETED"
    assert_same(tmp_path / "runs" / "r", unbroken)


def test_a_pre_empted_job_that_may_not_go_back_is_shown_so_and_goes_on_if_submitted_again(
    unbroken, testbed, tmp_path
):
    """For SLURM it is COMPLETED, as its ranks left in good order."""
    slow(testbed)
    where = ("--partition=spare", "--nodelist=node[1-2]", "--exclusive", "--no-requeue")
    job = testbed.train(*FLAGS, cwd=tmp_path, nodes=2, options=where)
    trains(tmp_path / "runs" / "r")
    first = ("--partition=urgent", "--nodelist=node1", "--exclusive", "--wrap=sleep 600")
    urgent = testbed.submit(*first, cwd=tmp_path)
    assert testbed.wait(job, timeout=120) == "COMPLETED"  # it left in its time of grace
    row = testbed.shown(tmp_path, job)
    assert row["state"] == "preempted" and row["checkpoint"].startswith("step-"), row
    testbed.on("head", "scancel", urgent)

    testbed.fault("fast", "node2")
    again = testbed.train(*FLAGS, cwd=tmp_path, nodes=2, options=where)
    assert testbed.wait(again, timeout=400) == "COMPLETED"
    assert_same(tmp_path / "runs" / "r", unbroken)
