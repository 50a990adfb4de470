"""A job that loses a node, or a cable; and what `dist-looksam jobs` says about it."""

import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_launch import differs, run_plain
from testbed import ROOT, trains, until

pytestmark = [pytest.mark.needs("slurm"), pytest.mark.timeout(1200)]

# SGD, so that weights after a resume can be compared tightly.
FLAGS = shlex.split(
    "--optimizer look_sam --base sgd --lr 0.01 --data digits --model vit_8 --augment none "
    "--batch_size 48 --backend ddp"
)
STEPS = "120"  # long enough to be lost in the middle


def host_of_rank(run: Path, rank: int) -> str:
    return json.loads((run / "job.json").read_text())["hosts"][rank]


def test_a_job_whose_node_loses_power_is_requeued_and_ends_as_if_nothing_had_been(
    testbed, tmp_path
):
    run = tmp_path / "runs" / "r"
    job = testbed.train(*FLAGS, "--steps", STEPS, "--save_every", "10", cwd=tmp_path, nodes=4)
    until((run / "checkpoints" / "step-10").exists, 400)
    testbed.fault("powercut", host_of_rank(run, 2))
    flags = [f if f != "ddp" else "plain" for f in FLAGS]
    with ThreadPoolExecutor() as meanwhile:  # SLURM waits for the node, and before a restart
        alone = meanwhile.submit(run_plain, tmp_path / "alone", *flags, "--steps", STEPS)
        until(lambda: testbed.told(job, "Restarts") == "1", 240)
        row = testbed.shown(tmp_path, job)  # the job may have found another node by now
        assert row["state"] in ("requeued", "running") and row["requeues"] == "1"
        assert row["checkpoint"].startswith("step-")
        assert testbed.wait(job, timeout=600) == "COMPLETED"

    log = (tmp_path / f"slurm-{job}.out").read_text()
    assert "resumed from" in log
    row = testbed.shown(tmp_path, job)
    assert (row["state"], row["step"], row["requeues"]) == ("finished", f"{STEPS}/{STEPS}", "1")
    assert row["checkpoint"] == f"step-{STEPS}" and row["job"] == job
    assert differs(run, alone.result()) < 1e-5  # the contract's 1e-6 is after 20 steps


def test_a_cut_cable_ends_all_ranks_within_the_time_out_and_is_named(testbed, tmp_path):
    run = tmp_path / "runs" / "r"
    flags = [*FLAGS, "--steps", "5000", "--timeout", "8"]
    job = testbed.train(*flags, cwd=tmp_path, nodes=4, options=("--no-requeue",))
    trains(run)
    lost = host_of_rank(run, 2)
    hosts = json.loads((run / "job.json").read_text())["hosts"]
    testbed.fault("unplug", lost)
    began = time.monotonic()

    def ended() -> bool:
        return not any(testbed.on(h, "pgrep", "-f", "[t]rain.py", check=False) for h in hosts)

    until(ended, 90)
    assert time.monotonic() - began < 8 + 60  # what it takes to find out who, on busy cores
    assert f"lost rank 2 on {lost}" in (tmp_path / f"slurm-{job}.out").read_text()
    testbed.wait(job, timeout=240)
    assert testbed.shown(tmp_path, job)["state"] in ("failed", "node fail")


def test_a_running_job_is_shown_printed_and_cancelled(testbed, tmp_path):
    run = tmp_path / "runs" / "r"
    job = testbed.train(*FLAGS, "--steps", "5000", cwd=tmp_path, nodes=4)
    trains(run)
    row = testbed.shown(tmp_path, job)
    assert (row["state"], row["job"]) == ("running", job) and row["step"].endswith("/5000")
    tool = [sys.executable, "-m", "dist_looksam.cli.main"]
    env = {"PYTHONPATH": str(ROOT)}
    assert "look_sam on sgd" in testbed.on("head", *tool, "logs", "runs/r", cwd=tmp_path, env=env)
    testbed.on("head", *tool, "cancel", "runs/r", cwd=tmp_path, env=env)
    assert testbed.wait(job, timeout=240) == "CANCELLED"
    assert testbed.shown(tmp_path, job)["state"] == "cancelled"
