"""Horovod as a user starts it, over gloo and MPI; and the library's traps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dist_looksam.run import train
from launch import HERE, environment, horovodrun, run

pytestmark = pytest.mark.needs("horovod")

TRAIN = HERE.parents[1] / "train.py"
FLAGS = ["--data", "digits", "--optimizer", "look_layer_sam", "--steps", "12", "--batch_size", "48"]
FLAGS += ["--save_every", "5", "--device", "cpu"]
# One sum of two numbers is the same in any order; norms are summed in another one.
TOLERANCE = 2e-5


def trained(out: Path) -> tuple[dict, dict]:
    return json.loads((out / "summary.json").read_text()), load_file(out / "model.safetensors")


def differs(weights: dict, others: dict) -> float:
    assert weights.keys() == others.keys()
    return max(float((weights[n] - w).abs().max()) for n, w in others.items())


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    """A run over gloo that nothing disturbed."""
    out = tmp_path_factory.mktemp("gloo") / "run"
    horovodrun(2, TRAIN, *FLAGS, "--out", out, by="gloo")
    return trained(out)


def test_horovodrun_over_gloo_chooses_horovod_by_itself(gloo):
    summary, _ = gloo
    assert summary["backend"] == "horovod" and summary["world_size"] == 2
    assert summary["forward_backward_passes"] == 12 + 3


@pytest.mark.needs("mpi")
def test_horovodrun_over_mpi_chooses_horovod_by_itself(gloo, tmp_path):
    """What `horovodrun` does without --gloo; its ranks were once taken for those of mpirun."""
    run(["horovodrun", "-np", "2", sys.executable, str(TRAIN), *FLAGS, "--out", str(tmp_path)],
        600, {})  # fmt: skip
    summary, weights = trained(tmp_path)
    assert summary["backend"] == "horovod" and summary["world_size"] == 2
    assert differs(weights, gloo[1]) < TOLERANCE


@pytest.mark.needs("mpi")
@pytest.mark.parametrize(
    "flags, backend", [([], "ddp"), (["--backend", "horovod", "--zero_stage", "1"], "horovod")]
)
def test_mpirun_trains_with_horovod_only_if_told(gloo, tmp_path, flags, backend):
    """And all end at the same weights, whole, sharded or by torch's own transport."""
    horovodrun(2, TRAIN, *FLAGS, *flags, "--out", tmp_path, by="mpirun")
    summary, weights = trained(tmp_path)
    assert summary["world_size"] == 2 and summary["backend"] == backend
    assert differs(weights, gloo[1]) < TOLERANCE


def test_traps_of_the_library_are_not_stepped_into():
    """broadcast_optimizer_state steps an optimizer without state, which decays its weights.

    Done after broadcasting the weights, ranks train on from different ones without an error.
    """
    said = horovodrun(2, "horovod_traps_worker.py", by="gloo")
    lines = [line.split(":", 1)[1].split(": ", 1) for line in said.splitlines() if ": " in line]
    told = {name: text for name, text in lines}
    assert float(told["naive"]) > 1e-4
    assert "different ones in" in told["found"] and "first" in told["found"]
    assert told["ours"] == "0.0 1"
    assert "hvd.DistributedOptimizer" in told["refused"]
    assert "call engine.step(micro_batches)" in told["beside"]


def test_ranks_that_resume_from_different_weights_stop_with_a_sentence(tmp_path):
    """As where --out is on a disk of each node's own."""
    for rank, seed_of_other in enumerate(("1e-3", "2e-3")):
        flags = [*FLAGS[:-4], "--steps", "5", "--schedule", "constant", "--lr", seed_of_other]
        flags += ["--backend", "plain", "--device", "cpu"]
        assert train.main([*flags, "--out", str(tmp_path / str(rank) / "run")]) == 0
    each = f'cd "$HOROVOD_RANK" && exec {sys.executable} {TRAIN} "$@"'
    command = ["horovodrun", "--gloo", "--network-interfaces", "lo", "-np", "2", "bash", "-c", each]
    told = subprocess.run(
        [*command, "-", *FLAGS, "--out", "run", "--resume", "auto"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert told.returncode != 0
    rows = (tmp_path / "0" / "run" / "metrics.jsonl").read_text()
    assert rows.count('"loss"') == 5  # nothing was trained
    said = [line for line in (told.stdout + told.stderr).splitlines() if "error: " in line]
    assert len(said) == 1 and "ranks must hold the same weights, got different ones in" in said[0]


@pytest.mark.parametrize("flags, says", [
    (["--zero_stage", "2"], "shards at zero_stage 1 only, without offload, got zero_stage 2; use"),
    (["--offload"], "offload is of backend zero, got backend horovod; leave it out or use"),
    (["--compression", "8"], "compression must be one of none, fp16, got '8'"),
])  # fmt: skip
def test_what_horovod_cannot_do_is_one_sentence(tmp_path, capfd, flags, says):
    given = ["--data", "digits", "--backend", "horovod", *flags, "--out", str(tmp_path)]
    assert train.main(given) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and says in told


@pytest.mark.parametrize("launched", [{}, {"HOROVOD_ELASTIC": "1"}])
def test_a_horovod_of_another_torch_is_one_sentence(tmp_path, capfd, monkeypatch, launched):
    """It has symbols that torch lacks, and Python then says so at length."""
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert train.main(["--data", "digits", "--backend", "horovod", "--out", str(tmp_path)]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "Horovod must be built for torch" in told
