"""`dist-looksam submit` with a hostfile: the real launcher over ssh, `jobs`, `logs`, `cancel`."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from test_launch import FLAGS, TOLERANCE, differs, hostfile
from testbed import ROOT, Cluster, trains, until

pytestmark = [pytest.mark.needs("slurm", "deepspeed"), pytest.mark.timeout(900)]

PROGRAMS = Path(sys.executable).parent
ENV = {"PYTHONPATH": str(ROOT), "PATH": f"{PROGRAMS}:/usr/sbin:/usr/bin:/sbin:/bin"}
EXPORTS = "GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n"


def command(testbed: Cluster, folder: Path, *words: str) -> str:
    """What a command of dist-looksam prints on the head, where no rank runs."""
    program = [sys.executable, "-m", "dist_looksam.cli.main"]
    env = ENV | {"DS_ENV_FILE": str(folder / ".deepspeed_env")}
    return testbed.on("head", *program, *words, cwd=folder, env=env, timeout=300)


def state(testbed: Cluster, folder: Path, run: str) -> str:
    said = command(testbed, folder, "jobs", "--json")
    return next(row["state"] for row in map(json.loads, said.splitlines()) if row["run"] == run)


def submit(testbed: Cluster, folder: Path, run: str, *flags: str) -> str:
    (folder / ".deepspeed_env").write_text(EXPORTS)
    own = ["--hostfile", str(hostfile(folder)), "--nodes", "2", "--skip", "memory"]
    return command(
        testbed, folder, "submit", *own, "--", *FLAGS, "--device", "cpu", "--out", run, *flags
    )


def test_the_first_machines_of_a_hostfile_train_to_the_weights_of_one_process(
    testbed, alone, tmp_path
):
    said = submit(testbed, tmp_path, "runs/two")
    assert "2 of 8 machines, deepspeed.sh" in said and "HOSTFILE=" in said
    assert state(testbed, tmp_path, "runs/two") in ("starting", "running")
    until((tmp_path / "runs/two/summary.json").exists, 400)
    assert state(testbed, tmp_path, "runs/two") in ("running", "finished")
    printed = command(testbed, tmp_path, "logs", "runs/two", "--lines", "400")
    assert all(f"node{n}: " in printed for n in (1, 2)) and "node3: " not in printed
    assert '"world_size": 2' in (tmp_path / "runs/two/summary.json").read_text()
    assert differs(tmp_path / "runs/two", alone) < TOLERANCE


def test_cancel_where_it_was_submitted_ends_the_ranks_on_other_machines(testbed, tmp_path):
    submit(testbed, tmp_path, "runs/long", "--steps", "100000")
    trains(tmp_path / "runs/long")
    assert "told process" in command(testbed, tmp_path, "cancel", "runs/long")

    def running() -> str:
        search = shlex.split("pgrep -f train.py")
        return "".join(testbed.on(f"node{n}", *search, check=False) for n in (1, 2))

    until(lambda: not running().strip(), 120, running)
    assert state(testbed, tmp_path, "runs/long") == "stopped"
