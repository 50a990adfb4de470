"""What `dist-looksam jobs` says of a job in each situation it can be in; arrays."""

import json
import shlex
from pathlib import Path

import pytest
from testbed import ROOT, SITE, Cluster, trains, until

pytestmark = [pytest.mark.needs("slurm"), pytest.mark.timeout(900)]

FLAGS = shlex.split(
    "--optimizer look_sam --base sgd --lr 0.01 --data digits --model vit_8 --augment none "
    "--batch_size 48 --steps 5000 --timeout 8"
)


def rank_on(testbed: Cluster, host: str) -> str:
    """The process id of the rank there."""
    return testbed.on(host, "pgrep", "-f", "[t]rain.py").split()[0]


def host_of(run: Path, rank: int) -> str:
    return json.loads((run / "job.json").read_text())["hosts"][rank]


def test_a_held_job_waits_then_runs_and_is_lost_with_its_node(testbed, tmp_path):
    options = ("--hold", "--no-requeue")
    job = testbed.train(*FLAGS, cwd=tmp_path, nodes=2, options=options)
    row = testbed.shown(tmp_path, job)  # there is no folder of runs yet
    assert (row["state"], row["run"], row["reason"]) == ("waiting", "(looksam)", "JobHeldUser")
    testbed.on("head", "scontrol", "release", job)
    trains(tmp_path / "runs" / "r")
    row = testbed.shown(tmp_path, job)
    assert (row["state"], row["run"]) == ("running", "runs/r") and row["step"].endswith("/5000")
    node = host_of(tmp_path / "runs" / "r", 1)
    try:
        testbed.on("head", "scontrol", "update", f"node={node}", "state=down", "reason=test")
        testbed.shown_as("node fail", tmp_path, job, timeout=60)
    finally:
        testbed.on("head", "scontrol", "update", f"node={node}", "state=resume", check=False)


def test_submit_asks_the_real_sinfo_and_its_job_is_cancelled_by_its_run(testbed, tmp_path):
    tool = (SITE["PYTHON"], "-m", "dist_looksam.cli.main")
    own = SITE | {"PYTHONPATH": str(ROOT)}
    words = ("submit", "--gpus", "1", "--time", "5", "--sbatch=--hold", "--nodes")
    flags = ("--", *FLAGS, "--device", "cpu", "--out", "runs/r")
    said = testbed.on("head", *tool, *words, "12", *flags, cwd=tmp_path, env=own, check=False)
    assert "error: nodes must be <= the 8 of partition" in said
    said = testbed.on("head", *tool, *words, "2", *flags, cwd=tmp_path, env=own)
    job = json.loads((tmp_path / "runs" / "r" / "submitted.json").read_text())["slurm_job_id"]
    assert f"SLURM job {job} will train into runs/r" in said
    row = testbed.shown(tmp_path, job)
    assert (row["state"], row["run"]) == ("waiting", "runs/r")
    testbed.on("head", *tool, "cancel", "runs/r", cwd=tmp_path, env=own)
    testbed.shown_as("cancelled", tmp_path, job, timeout=60)


def test_a_killed_rank_ends_the_others_and_is_named(testbed, tmp_path):
    job = testbed.train(*FLAGS, cwd=tmp_path, nodes=3)
    trains(tmp_path / "runs" / "r")
    lost = host_of(tmp_path / "runs" / "r", 2)
    testbed.on(lost, "kill", "-KILL", rank_on(testbed, lost))
    hosts = ("node1", "node2", "node3")
    found = ("pgrep", "-f", "[t]rain.py")
    until(lambda: not any(testbed.on(h, *found, check=False) for h in hosts), 8 + 20)
    assert testbed.wait(job, timeout=60) == "FAILED"
    assert testbed.shown(tmp_path, job)["state"] == "failed"
    log = (tmp_path / f"slurm-{job}.out").read_text()
    assert f"{lost}: task 2: Killed" in log  # srun's word


def test_an_array_is_a_sweep_and_its_elements_are_cancelled_one_by_one(testbed, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("--steps 2 --out 'runs/two words'\n--seed 7\n--seed 8\n")
    script = f"{ROOT}/launch/slurm.sbatch"
    env = SITE | {"SWEEP": "lines.txt"}
    array = testbed.submit("--array=1-4", "--nodes=1", script, *FLAGS, cwd=tmp_path, env=env)
    runs = tmp_path / "runs"
    trains(runs / f"slurm-{array}_2")
    trains(runs / f"slurm-{array}_3")
    until((runs / "two words" / "summary.json").exists, 240)
    assert testbed.shown(tmp_path, f"{array}_1")["state"] == "finished"
    assert "seed: 7" in (runs / f"slurm-{array}_2" / "config.yaml").read_text()
    said = "".join(p.read_text() for p in tmp_path.glob("slurm-*.out"))
    assert "SWEEP=lines.txt must have a line 4 for this element of the array, got 3 lines" in said

    tool = (SITE["PYTHON"], "-m", "dist_looksam.cli.main")
    own = {"PYTHONPATH": str(ROOT)}
    run = f"runs/slurm-{array}_3"
    said = testbed.on("head", *tool, "logs", run, cwd=tmp_path, env=own)
    assert "look_sam on sgd" in said
    testbed.on("head", *tool, "cancel", run, cwd=tmp_path, env=own)
    testbed.shown_as("cancelled", tmp_path, f"{array}_3", timeout=60)
    assert testbed.shown(tmp_path, f"{array}_2")["state"] == "running"
