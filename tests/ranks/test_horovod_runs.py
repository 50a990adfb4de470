"""Horovod as a user starts it: gloo, MPI, elastic; and the library's traps."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launch import HERE, horovodrun, run

pytestmark = pytest.mark.needs("horovod")

TRAIN = HERE.parents[1] / "train.py"
FLAGS = ["--data", "digits", "--optimizer", "look_layer_sam", "--steps", "12", "--batch_size", "48"]
FLAGS += ["--save_every", "5", "--device", "cpu"]


def trained(out: Path) -> tuple[dict, dict]:
    return json.loads((out / "summary.json").read_text()), load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    """A run over gloo that nothing disturbed."""
    out = tmp_path_factory.mktemp("gloo") / "run"
    horovodrun(2, TRAIN, *FLAGS, "--out", out)
    return trained(out)


def test_horovodrun_over_gloo_chooses_horovod_by_itself(gloo):
    summary, _ = gloo
    assert summary["backend"] == "horovod" and summary["world_size"] == 2
    assert summary["forward_backward_passes"] == 12 + 3


@pytest.mark.needs("mpi")
def test_sharded_over_mpi_ends_where_gloo_does(gloo, tmp_path):
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    command += [sys.executable, str(TRAIN), "--backend", "horovod", "--zero_stage", "1"]
    run([*command, *FLAGS, "--out", str(tmp_path / "run")], 600, {})
    summary, weights = trained(tmp_path / "run")
    assert summary["world_size"] == 2 and summary["backend"] == "horovod"
    # One sum of two numbers is the same in any order; norms are summed in another one.
    assert max(float((weights[n] - w).abs().max()) for n, w in gloo[1].items()) < 2e-5


HOSTS = """#!/bin/sh
if [ -e {marker} ]; then echo localhost:2; else echo localhost:1; echo 127.0.0.1:1; fi
"""


@pytest.mark.parametrize("stage", ["0", "1"])
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(gloo, tmp_path, stage):
    """One of two is killed with SIGKILL at step 7; another joins, and they end bit-equal.

    On one machine a failure takes the whole host out of use, hence two names for it.
    """
    marker, out, hosts = tmp_path / "killed", tmp_path / "run", tmp_path / "hosts.sh"
    hosts.write_text(HOSTS.format(marker=marker))
    hosts.chmod(0o755)
    command = ["horovodrun", "--gloo", "-np", "2", "--min-np", "2", "--max-np", "2"]
    command += ["--network-interfaces", "lo", "--host-discovery-script", str(hosts)]
    command += [sys.executable, str(HERE / "elastic_worker.py"), str(marker)]
    said = run([*command, *FLAGS, "--zero_stage", stage, "--out", str(out)], 600, {})
    assert marker.exists() and "step-5 at step 5" in said
    assert (out / "ended").read_text() == "2"  # written after comparing the weights' bits
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "loss" in row] == list(range(12))
    _, weights = trained(out)
    assert max(float((weights[n] - w).abs().max()) for n, w in gloo[1].items()) < 2e-5


def test_traps_of_the_library_are_not_stepped_into():
    """broadcast_optimizer_state steps an optimizer without state, which decays its weights.

    Done after broadcasting the weights, ranks train on from different ones without an error.
    """
    said = horovodrun(2, "horovod_traps_worker.py")
    lines = [line.split(":", 1)[1].split(": ", 1) for line in said.splitlines() if ": " in line]
    told = {name: text for name, text in lines}
    assert float(told["naive"]) > 1e-4
    assert "different ones in" in told["found"] and "first" in told["found"]
    assert told["ours"] == "0.0 1"
    assert "hvd.DistributedOptimizer" in told["refused"]
