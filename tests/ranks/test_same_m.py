"""train.py with the same --m gives the same weights in one process and under ZeRO, on any ranks."""

import pytest
from safetensors.torch import load_file

from launch import play_train

pytestmark = pytest.mark.needs("deepspeed")

FLAGS = ["--data", "digits", "--model", "vit_8", "--steps", "10", "--batch_size", "64", "--k", "3"]
FLAGS += ["--optimizer", "look_sam", "--base", "sgd", "--m", "32", "--workers", "0"]
FLAGS += ["--augment", "crop,flip", "--drop_path", "0.2", "--device", "cpu"]
RUNS = {  # ranks -> name -> flags. In one process a group is two micro-batches, or half of one.
    1: {"plain": ["--micro_batch", "16"], "parts": ["--micro_batch", "64"]},
    2: {f"zero-{s}": ["--backend", "zero", "--zero_stage", str(s), "--micro_batch", "16"]
        for s in range(4)} | {"own": ["--backend", "zero", "--zero_stage", "1"]},
    4: {"zero-1": ["--backend", "zero", "--zero_stage", "1", "--micro_batch", "16"],
        "zero-3": ["--backend", "zero", "--zero_stage", "3", "--micro_batch", "8"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(ranks, name) -> run directory; each number of ranks is started once."""
    folder = tmp_path_factory.mktemp("same-m")
    for ranks, runs in RUNS.items():
        cases = [[*FLAGS, *f, "--out", str(folder / f"{ranks}-{n}")] for n, f in runs.items()]
        play_train(folder, ranks, cases, 1400)
    return lambda ranks, name: folder / f"{ranks}-{name}" / "model.safetensors"


@pytest.mark.parametrize("ranks, name", [(r, n) for r, runs in RUNS.items() for n in runs])
def test_weights_depend_on_m_and_not_on_ranks_backend_or_micro_batch(trained, ranks, name):
    want, got = load_file(trained(1, "plain")), load_file(trained(ranks, name))
    assert max(float((got[n] - want[n]).abs().max()) for n in want) < 1e-6
