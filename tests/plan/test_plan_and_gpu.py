"""Planned times against those that were measured on a GPU, the table of docs/gpu."""

import json
from pathlib import Path

import pytest

from dist_looksam.plan.forecast import plan
from dist_looksam.settings import config

FILE = Path(__file__).parents[2] / "docs" / "gpu" / "2026-11-28-h200.jsonl"
ROWS = [x for x in map(json.loads, FILE.read_text().splitlines()) if x["part"] == "speed"]


def of_row(row):
    """The plan of a measured row; the 16-bit stream and other trials are not in it."""
    images = str(row["micro_batch"])
    flags = ["--data", "folder", "--data_dir", "x", "--model", row["model"]]
    flags += ["--optimizer", row["optimizer"], "--precision", "bf16"]
    flags += ["--batch_size", images, "--micro_batch", images]
    flags += ["--compile", "off" if row["compile"] == "off" else "blocks"]
    return plan(config.parse(flags), gpus=1, gpus_per_node=1, machine="h200")


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


def test_the_row_in_which_the_host_was_the_limit_is_planned_so():
    waited = [x for x in ROWS if x.get("host_ms", 0) > 0.99 * x["ms"]]
    assert [(x["model"], x["micro_batch"]) for x in waited] == [("vit_s16", 256)]
    assert of_row(waited[0]).host_seconds == pytest.approx(1e-3 * waited[0]["host_ms"], rel=0.15)
