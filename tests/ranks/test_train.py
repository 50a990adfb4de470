"""train.py gives the same weights at any number of ranks and any accumulation."""

import json

import pytest
import torch
from safetensors.torch import load_file

from launch import torchrun

STEPS, BATCH = 20, 24
DIGITS = ["--data", "digits", "--steps", str(STEPS), "--batch_size", str(BATCH), "--k", "3"]
# Everything random at once: drawn by sample, so that it cannot depend on who draws.
RANDOM = ["--drop_path", "0.3", "--augment", "crop,flip,randaugment,mixup", "--clip", "1"]
ADAM_EPS = ["--eps", "1e-4"]  # with 1e-8, rounding near a zero gradient becomes a step of size lr
RUNS = {
    # name: (flags, largest difference in any weight)
    "look_sam-sgd": (["--optimizer", "look_sam", "--base", "sgd"], 1e-6),
    "look_sam-sgd-random": (["--optimizer", "look_sam", "--base", "sgd", *RANDOM], 1e-6),
    "look_sam-adamw": (["--optimizer", "look_sam", *ADAM_EPS], 2e-5),
    "look_layer_sam-lamb": (["--optimizer", "look_layer_sam", *ADAM_EPS, *RANDOM], 2e-5),
}
ACCUMULATIONS = (1, 2, 4)


def micro_batch(ranks: int, accumulation: int) -> int:
    return BATCH // (ranks * accumulation)


def possible(ranks: int, accumulation: int, name: str) -> bool:
    """Mixing needs pairs."""
    return "--augment" not in RUNS[name][0] or micro_batch(ranks, accumulation) % 2 == 0


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(ranks, accumulation, name) -> run directory; each number of ranks is started once."""
    folder = tmp_path_factory.mktemp("train")
    started = set()

    def of(ranks: int, accumulation: int, name: str):
        if ranks not in started:
            started.add(ranks)
            cases = [
                [*DIGITS, *flags, "--micro_batch", str(micro_batch(ranks, a)),
                 "--out", str(folder / f"{ranks}-{a}-{n}")]
                for n, (flags, _) in RUNS.items() for a in ACCUMULATIONS
                if possible(ranks, a, n)
            ]  # fmt: skip
            (folder / f"cases-{ranks}.json").write_text(json.dumps(cases))
            torchrun(ranks, "train_worker.py", folder / f"cases-{ranks}.json")
        return folder / f"{ranks}-{accumulation}-{name}"

    return of


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_weights_depend_on_the_global_batch_alone(trained, ranks, accumulation, name):
    if not possible(ranks, accumulation, name):
        pytest.skip("mixup needs an even micro_batch")
    want = load_file(trained(1, 1, name) / "model.safetensors")
    got = load_file(trained(ranks, accumulation, name) / "model.safetensors")
    worst = max(float((got[n] - want[n]).abs().max()) for n in want)
    assert worst < RUNS[name][1]


@pytest.mark.parametrize("name", RUNS)
def test_that_is_no_wonder_of_small_steps(trained, name):
    """Other samples move the weights a thousand times further than the tolerance."""
    torch.manual_seed(0)
    from dist_looksam import models

    start = models.create("vit_8", num_classes=10, image_shape=(1, 8, 8)).state_dict()
    end = load_file(trained(1, 1, name) / "model.safetensors")
    assert max(float((end[n] - start[n]).abs().max()) for n in end) > 1000 * RUNS[name][1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_summary_says_who_trained(trained, ranks):
    summary = json.loads((trained(ranks, 2, "look_sam-sgd") / "summary.json").read_text())
    assert summary["world_size"] == ranks
    assert summary["backend"] == ("plain" if ranks == 1 else "ddp")
    assert summary["batch_size"] == BATCH
    looks = -(-STEPS // 3)
    assert summary["forward_backward_passes"] == STEPS + looks


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_measured_on_the_way_does_not_depend_on_ranks_either(trained, ranks):
    def rows(of: int):
        text = (trained(of, 1, "look_sam-sgd-random") / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    for got, want in zip(rows(ranks), rows(1), strict=True):
        for field in set(want) - {"images_per_s", "seconds"}:
            assert got[field] == pytest.approx(want[field], rel=1e-3, abs=1e-6), field
