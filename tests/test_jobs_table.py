"""The table of runs where there is no SLURM, and the launch scripts' mistakes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from dist_looksam import jobs, rundir
from dist_looksam.errors import ConfigError
from dist_looksam.world import World

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))  # no squeue, no scontrol
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    folder = tmp_path / "runs" / "a"
    (folder / "checkpoints" / "step-4").mkdir(parents=True)
    (folder / "checkpoints" / "step-4" / "manifest.json").write_text("{}")
    (folder / "config.yaml").write_text("steps: 10\n")
    lines = [{"step": s, "images_per_s": 100.0, "seconds": 2.0 * (s + 1)} for s in range(5)]
    lines.append({"step": 5, "eval_top1": 0.25, "eval_loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def test_a_run_whose_process_is_gone_is_stopped(run):
    rundir.record(run, World(), ["here"])
    job = rundir.job(run) | {"pid": 2**22 + 1}
    (run / "job.json").write_text(json.dumps(job))
    row = jobs.row_of(run)
    assert (row["state"], row["step"], row["top1"]) == ("stopped", "5/10", "25.00%")
    assert (row["images/s"], row["checkpoint"], row["nodes"]) == ("100", "step-4", "here")


def test_a_run_that_writes_on_another_host_is_running_and_has_an_eta(run):
    rundir.record(run, World(), ["elsewhere"])
    (run / "job.json").write_text(json.dumps(rundir.job(run) | {"host": "elsewhere"}))
    row = jobs.row_of(run)
    assert (row["state"], row["eta"]) == ("running", "0:00:10")


def test_a_run_with_a_summary_is_finished_until_it_is_started_again(run):
    (run / "summary.json").write_text("{}")
    assert jobs.row_of(run)["state"] == "finished"
    rundir.record(run, World(), ["here"])
    assert jobs.row_of(run)["state"] != "finished"


def test_another_process_with_the_old_number_is_not_the_run(run):
    """Process numbers are used again: `cancel` would have stopped somebody else's program."""
    other = subprocess.Popen(["/bin/sleep", "60"])
    try:
        rundir.record(run, World(), ["here"])
        (run / "job.json").write_text(json.dumps(rundir.job(run) | {"pid": other.pid}))
        assert jobs.row_of(run)["state"] == "stopped"
        assert jobs.cancel([str(run)]) == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_no_such_folder_or_run_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="needs a folder of runs"):
        jobs.show_jobs([str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="must be a run directory"):
        jobs.show_log([str(tmp_path)])


@pytest.mark.parametrize(
    ("script", "env", "words"),
    [
        ("slurm.sbatch", {}, "is submitted: sbatch --nodes 8"),
        ("mpi.sh", {"HOSTFILE": ""}, "HOSTFILE must name a file"),
        ("mpi.sh", {"HOSTFILE": "cluster/hostfile.example", "RANKS": "99"}, "<= the 16 slots"),
        ("deepspeed.sh", {"HOSTFILE": "no/such/file"}, "HOSTFILE must name a file"),
        ("deepspeed.sh", {"NODES": "8"}, "NODES=8 needs HOSTFILE"),
        ("deepspeed.sh", {"HOSTFILE": "cluster/hostfile.example", "NODES": "8"}, "<= the 2 mach"),
        ("torchrun.sh", {"NODES": "8"}, "NODES=8 needs MASTER_ADDR"),
    ],
)
def test_a_launch_script_says_what_is_missing_in_one_sentence(script, env, words, tmp_path):
    for name in ("mpirun", "pdsh"):  # not to depend on what this machine has
        (tmp_path / name).write_text("#!/bin/sh\nexit 99\n")
        (tmp_path / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "NODES"))}
    done = subprocess.run(
        ["bash", f"launch/{script}"],
        cwd=ROOT,
        env=kept | {"PATH": f"{tmp_path}:/usr/bin:/bin"} | env,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
