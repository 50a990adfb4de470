"""Runs with each training loss, from the command line: what they report, refuse and resume."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dist_looksam.cli.main import main

FLAGS = ["train", "--data", "digits", "--device", "cpu", "--workers", "0", "--optimizer"]
FLAGS += ["look_sam", "--steps", "6", "--batch_size", "32", "--eval_every", "3", "--save_every"]
FLAGS += ["3", "--augment", "mixup"]
LOSSES = {
    "bce": ["--loss", "bce", "--label_smoothing", "0.1"],
    "weights": ["--class_weights", "balanced"],
}


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", LOSSES)
def test_a_resumed_run_ends_the_same_to_the_bit_and_evaluates_by_cross_entropy(name, tmp_path):
    out, again = tmp_path / "run", tmp_path / "again"
    assert main([*FLAGS, *LOSSES[name], "--out", str(out)]) == 0
    path = str(out / "checkpoints" / "step-3")
    assert main([*FLAGS, *LOSSES[name], "--out", str(again), "--resume", path]) == 0
    want, got = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert all(torch.equal(got[n], want[n]) for n in want)
    trained = [row["loss"] for row in rows(out) if "loss" in row]
    evaluated = [row["eval_loss"] for row in rows(out) if "eval_loss" in row]
    assert len(evaluated) == 2 and all(1.5 < loss < 3.0 for loss in evaluated)  # ln 10 = 2.3
    assert trained[0] == pytest.approx({"bce": 0.69, "weights": 2.4}[name], rel=0.1)  # ln 2


def test_weights_for_other_classes_end_the_run_before_it_begins(tmp_path, capsys):
    file = tmp_path / "weights.yaml"
    file.write_text("0: 1\n1: 2\n")
    assert main([*FLAGS, "--class_weights", str(file), "--out", str(tmp_path / "run")]) == 2
    assert "must name the 10 classes of the data, got none of 2" in capsys.readouterr().err
    gone = str(tmp_path / "gone.yaml")
    assert main([*FLAGS, "--class_weights", gone, "--dry_run"]) == 2
    assert "cannot be read ([Errno 2]" in capsys.readouterr().err
