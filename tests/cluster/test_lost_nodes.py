"""A job that loses a node, or a cable; and what `dist-looksam jobs` says about it."""

import json
import shlex
import sys
import time
from pathlib import Path

import pytest
from test_launch import ROOT, SITE, differs, run_plain
from testbed import Cluster

pytestmark = [pytest.mark.needs("slurm"), pytest.mark.timeout(1200)]

# SGD, so that weights after a resume can be compared tightly.
FLAGS = shlex.split(
    "--optimizer look_sam --base sgd --lr 0.01 --data digits --model vit_8 --augment none "
    "--batch_size 48 --backend ddp"
)
STEPS = "200"  # long enough to be lost in the middle


def submit(testbed: Cluster, folder: Path, *flags: str, options: tuple[str, ...] = ()) -> str:
    script = f"{ROOT}/launch/slurm.sbatch"
    return testbed.submit(
        "--nodes=4", *options, script, *FLAGS, *flags, "--out", "runs/r", cwd=folder, env=SITE
    )


def shown(testbed: Cluster, folder: Path) -> dict[str, str]:
    """The row of the run in `dist-looksam jobs`, called on the head."""
    command = [sys.executable, "-m", "dist_looksam.cli", "jobs", "--json"]
    said = testbed.on("head", *command, cwd=folder, env={"PYTHONPATH": str(ROOT)})
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return next(row for row in rows if row["run"] == "runs/r")


def until(told, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not told():
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(0.2)


def host_of_rank(run: Path, rank: int) -> str:
    return json.loads((run / "job.json").read_text())["hosts"][rank]


def test_a_job_whose_node_loses_power_is_requeued_and_ends_as_if_nothing_had_been(
    testbed, tmp_path
):
    run = tmp_path / "runs" / "r"
    job = submit(testbed, tmp_path, "--steps", STEPS, "--save_every", "10")
    until((run / "checkpoints" / "step-10").exists, 400)
    testbed.fault("powercut", host_of_rank(run, 2))
    told = ("scontrol", "-o", "show", "job", job)
    until(lambda: "Restarts=1 " in testbed.on("head", *told), 240)
    row = shown(testbed, tmp_path)  # the job may have found another node by now
    assert row["state"] in ("waiting", "running") and row["requeues"] == "1"
    assert row["checkpoint"].startswith("step-")
    assert testbed.wait(job, timeout=600) == "COMPLETED"

    log = (tmp_path / f"slurm-{job}.out").read_text()
    assert "resumed from" in log
    row = shown(testbed, tmp_path)
    assert (row["state"], row["step"], row["requeues"]) == ("finished", f"{STEPS}/{STEPS}", "1")
    assert row["checkpoint"] == f"step-{STEPS}" and row["job"] == job
    flags = [f if f != "ddp" else "plain" for f in FLAGS]
    alone = run_plain(tmp_path / "alone", *flags, "--steps", STEPS)
    assert differs(run, alone) < 1e-5  # the contract's 1e-6 is after 20 steps


def test_a_cut_cable_ends_all_ranks_within_the_time_out_and_is_named(testbed, tmp_path):
    run = tmp_path / "runs" / "r"
    options = ("--no-requeue",)
    job = submit(testbed, tmp_path, "--steps", "5000", "--timeout", "8", options=options)
    until(lambda: (run / "metrics.jsonl").exists(), 400)
    time.sleep(2)  # in the middle of the steps
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
    assert shown(testbed, tmp_path)["state"] in ("failed", "node fail")


def test_a_running_job_is_shown_printed_and_cancelled(testbed, tmp_path):
    run = tmp_path / "runs" / "r"
    job = submit(testbed, tmp_path, "--steps", "5000")
    until(lambda: (run / "metrics.jsonl").exists(), 400)
    row = shown(testbed, tmp_path)
    assert (row["state"], row["job"]) == ("running", job) and row["step"].endswith("/5000")
    tool = [sys.executable, "-m", "dist_looksam.cli"]
    env = {"PYTHONPATH": str(ROOT)}
    assert "look_sam on sgd" in testbed.on("head", *tool, "logs", "runs/r", cwd=tmp_path, env=env)
    testbed.on("head", *tool, "cancel", "runs/r", cwd=tmp_path, env=env)
    assert testbed.wait(job, timeout=240) == "CANCELLED"
    assert shown(testbed, tmp_path)["state"] == "cancelled"
