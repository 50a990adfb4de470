"""Elastic Horovod: workers die and join, and the run goes on from its newest checkpoint."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from dist_looksam.run import train
from launch import HERE, environment, run

pytestmark = pytest.mark.needs("horovod")

ROOT = HERE.parents[1]
FLAGS = ["--data", "digits", "--optimizer", "look_sam", "--base", "sgd", "--lr", "0.01"]
FLAGS += ["--batch_size", "48", "--save_every", "5", "--device", "cpu"]
SHORT, LONG = ["--steps", "12"], ["--steps", "100"]  # long enough to be killed from outside
# What the discovery script says: on one machine a failure takes the whole host out of use, hence
# two names for it.
HOSTS = """#!/bin/sh
if [ -e {marker} ]; then echo localhost:{left}; else echo localhost:1; echo 127.0.0.1:1; fi
"""


def hosts_script(folder: Path, *, left: int) -> Path:
    """Makes folder/hosts.sh; returns the file whose coming says that 127.0.0.1 is lost."""
    marker = folder / "killed"
    (folder / "hosts.sh").write_text(HOSTS.format(marker=marker, left=left))
    (folder / "hosts.sh").chmod(0o755)
    return marker


def check(out: Path, undisturbed: Path, steps: int, tolerance: float) -> None:
    """Every step once, and the weights of a run in one process."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "loss" in row] == list(range(steps))
    weights, wanted = (load_file(p / "model.safetensors") for p in (out, undisturbed))
    assert weights.keys() == wanted.keys()
    assert max(float((weights[n] - w).abs().max()) for n, w in wanted.items()) < tolerance


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Runs of both lengths in one process."""
    out = tmp_path_factory.mktemp("undisturbed")
    for steps in (SHORT, LONG):
        assert train.main([*FLAGS, *steps, "--backend", "plain", "--out", str(out / steps[1])]) == 0
    return out


@pytest.mark.parametrize("stage", ["0", "1"])
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(undisturbed, tmp_path, stage):
    """One of two is killed with SIGKILL at step 7; another joins, and they end bit-equal."""
    marker, out = hosts_script(tmp_path, left=2), tmp_path / "run"
    command = ["horovodrun", "--gloo", "-np", "2", "--min-np", "2", "--max-np", "2"]
    command += ["--network-interfaces", "lo"]
    command += ["--host-discovery-script", str(tmp_path / "hosts.sh")]
    command += [sys.executable, str(HERE / "elastic_worker.py"), str(marker)]
    said = run([*command, *FLAGS, *SHORT, "--zero_stage", stage, "--out", str(out)], 600, {})
    assert marker.exists() and "step-5 at step 5" in said
    assert (out / "ended").read_text() == "2"  # written after comparing the weights' bits
    check(out, undisturbed / "12", 12, 1e-6)


def worker_on(host: str, launcher: psutil.Process) -> psutil.Process:
    for process in launcher.children(recursive=True):
        try:
            trains = any(word.endswith("train.py") for word in process.cmdline()[1:2])
            if trains and process.environ().get("HOROVOD_HOSTNAME") == host:
                return process
        except psutil.NoSuchProcess:
            continue
    raise AssertionError(f"no worker on {host}")


def test_the_launch_script_goes_on_with_one_worker_less(undisturbed, tmp_path):
    """As launch/horovod.sh says to type it, and killed from outside at whatever step that is."""
    marker, out = hosts_script(tmp_path, left=1), tmp_path / "run"
    options = ["--gloo", "-np", "2", "--min-np", "1", "--max-np", "2"]
    options += ["--host-discovery-script", "./hosts.sh", "--network-interfaces", "lo"]
    command = ["bash", str(ROOT / "launch" / "horovod.sh"), *options, "--", *FLAGS, *LONG]
    with open(tmp_path / "log", "w") as log:
        launched = subprocess.Popen(
            [*command, "--out", "run"], cwd=tmp_path, env=environment(), stdout=log, stderr=log
        )
    while not (out / "checkpoints" / "step-10").exists():
        assert launched.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    victim = worker_on("127.0.0.1", psutil.Process(launched.pid))
    marker.touch()
    victim.kill()
    assert launched.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    assert "resumed from" in (tmp_path / "log").read_text()
    assert json.loads((out / "summary.json").read_text())["world_size"] == 1
    check(out, undisturbed / "100", 100, 1e-5)  # the contract's 1e-6 is after 20 steps
