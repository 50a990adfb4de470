"""Planned times against those that were measured on a GPU, the table of docs/gpu."""

import json
from pathlib import Path

import pytest

from dist_looksam.plan.forecast import plan
from dist_looksam.settings import config

FILE = Path(__file__).parents[2] / "docs" / "gpu" / "2026-11-28-h200.jsonl"
# On an H100, 2 x 128 images a step, k = 5 (docs/planning.md): milliseconds of a step.
H100 = {
    ("vit_b16", "adamw"): 102,
    ("vit_b16", "lamb"): 1.02 * 102,
    ("vit_b16", "sam"): 2.18 * 102,
    ("vit_b16", "look_sam"): 1.26 * 102,
    ("vit_b16", "look_layer_sam"): 1.28 * 102,
    ("vit_s16", "look_layer_sam"): 101,  # the host's time
}
ROWS = [x for x in map(json.loads, FILE.read_text().splitlines()) if x["part"] == "speed"]


def planned(gpu, model, optimizer, images, micro_batch, *more):
    flags = ["--data", "folder", "--data_dir", "x", "--model", model, "--optimizer", optimizer]
    flags += ["--batch_size", str(images), "--micro_batch", str(micro_batch), *more]
    settings = config.parse([*flags, "--precision", "bf16"])
    return plan(settings, gpus=1, gpus_per_node=1, machine=gpu)


def of_row(row):
    """The plan of a measured row; the 16-bit stream and other trials are not in it."""
    images, compiled = row["micro_batch"], "off" if row["compile"] == "off" else "blocks"
    of = ("h200", row["model"], row["optimizer"], images, images)
    return planned(*of, "--compile", compiled)


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda x: f"{x['model']}-{x['micro_batch']}-{x['compile']}-{x['optimizer']}"
)
def test_a_planned_step_takes_what_an_h200_took_within_15_percent(row):
    """Steps of looks in this file are those without the kernels, which came after it: longer."""
    found = 1e3 * of_row(row).times["mean"].total
    if row["optimizer"] == "look_layer_sam":
        assert found < row["ms"]
    else:
        assert found == pytest.approx(row["ms"], rel=0.15)


@pytest.mark.parametrize("model, optimizer", H100, ids="-".join)
def test_a_planned_step_takes_what_an_h100_took_within_15_percent(model, optimizer):
    found = planned("h100", model, optimizer, 256, 128)
    ms = H100[model, optimizer]
    assert 1e3 * found.times["mean"].total == pytest.approx(ms, rel=0.15)
    assert bool(found.host_seconds) == (model == "vit_s16")


def test_the_row_in_which_the_host_was_the_limit_is_planned_so():
    waited = [x for x in ROWS if x.get("host_ms", 0) > 0.99 * x["ms"]]
    assert [(x["model"], x["micro_batch"]) for x in waited] == [("vit_s16", 256)]
    assert of_row(waited[0]).host_seconds == pytest.approx(1e-3 * waited[0]["host_ms"], rel=0.15)
