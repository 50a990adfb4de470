"""--compile blocks on every backend: one graph, no break, the weights of the run without it."""

import json
import sys

import pytest
from safetensors.torch import load_file

from launch import HERE
from launch import run as launched

FLAGS = ["--data", "digits", "--steps", "7", "--batch_size", "24", "--micro_batch", "4", "--k", "3"]
FLAGS += ["--drop_path", "0.3", "--optimizer", "look_layer_sam", "--clip", "1", "--eps", "1e-4"]
FLAGS += ["--eval_every", "5"]
BACKENDS = {
    "ddp": ["--backend", "ddp"],
    "fsdp2": ["--backend", "fsdp2"],
    "zero 1": ["--backend", "zero", "--zero_stage", "1"],
    "zero 2": ["--backend", "zero", "--zero_stage", "2"],
    "zero 3": ["--backend", "zero", "--zero_stage", "3"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> run directory, of compiled runs on two ranks; "eager" is not compiled."""
    folder = tmp_path_factory.mktemp("compiled")
    cases = [[*FLAGS, *BACKENDS["ddp"], "--out", str(folder / "eager")]]
    cases += [
        [*FLAGS, *flags, "--compile", "blocks", "--out", str(folder / name)]
        for name, flags in BACKENDS.items()
    ]
    half = [*FLAGS, *BACKENDS["ddp"], "--compile", "blocks", "--out", str(folder / "resumed")]
    cases += [[*half, "--save_every", "4"]]
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    launched([sys.executable, str(HERE / "compiled_worker.py"), "2", str(file)], 900, {})
    return folder


@pytest.mark.parametrize("name", BACKENDS)
def test_all_blocks_share_one_graph_and_nothing_is_compiled_again(runs, name):
    counts = json.loads((runs / name / "counts.json").read_text())
    assert counts["stats"]["unique_graphs"] == 1, counts
    assert not counts["recompiles"] and not counts["graph_break"], counts


@pytest.mark.parametrize("name", BACKENDS)
def test_compiled_runs_end_in_the_weights_of_eager_ones(runs, name):
    want = load_file(runs / "eager" / "model.safetensors")
    got = load_file(runs / name / "model.safetensors")
    assert got.keys() == want.keys()
    assert max(float((got[n] - want[n]).abs().max()) for n in want) < 2e-5


def test_the_time_of_compiling_is_told_and_left_out(runs):
    assert "compiled in the first step, which took" in (runs / "ddp" / "log.txt").read_text()
    first = json.loads((runs / "ddp" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["images_per_s"] is None
