"""`--ema`: both accuracies, both files, resumes, what the plan says."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dist_looksam.checkpoint import Reader
from dist_looksam.cli.main import main

FLAGS = ["train", "--data", "digits", "--device", "cpu", "--workers", "0", "--optimizer"]
FLAGS += ["look_sam", "--steps", "30", "--batch_size", "64", "--eval_every", "10"]
EMA = ["--ema", "0.8", "--save_every", "17"]


def train(out, *flags, code=0):
    assert main([*FLAGS, "--out", str(out), *flags]) == code
    return out


def evaluations(out):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "eval_top1" in row]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("ema") / "run", *EMA)


def test_a_run_reports_and_writes_the_average_beside_the_weights(run, capsys):
    rows = evaluations(run)
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert all(row["ema_loss"] != row["eval_loss"] for row in rows)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ema_top1"] == pytest.approx(rows[-1]["ema_top1"], abs=1e-8)
    raw, ema = (load_file(run / f"{n}.safetensors") for n in ("model", "model_ema"))
    assert raw.keys() == ema.keys() and not all(torch.equal(raw[n], ema[n]) for n in raw)
    assert f"ema {summary['ema_top1']:.4f}" in (run / "log.txt").read_text()


def test_the_export_of_a_checkpoint_has_the_average(run, tmp_path):
    file = tmp_path / "weights.safetensors"
    assert main(["checkpoint", "export", str(run), str(file), "--ema"]) == 0
    want, got = load_file(run / "model_ema.safetensors"), load_file(file)
    assert want.keys() == got.keys() and all(torch.equal(got[n], want[n]) for n in want)


def test_a_checkpoint_without_an_average_has_none_to_export(tmp_path, capsys):
    out = train(tmp_path / "run", "--steps", "2")
    assert main(["checkpoint", "export", str(out), str(tmp_path / "file"), "--ema"]) == 2
    assert "must hold averages of the weights for --ema, got" in capsys.readouterr().err
    assert "ema_top1" not in json.loads((out / "summary.json").read_text())
    assert not (out / "model_ema.safetensors").exists()


def test_a_resumed_run_ends_with_the_same_average_to_the_bit(run, tmp_path):
    path = run / "checkpoints" / "step-17"
    out = train(tmp_path / "again", *EMA, "--resume", str(path))
    for name in ("model", "model_ema"):
        want, got = (load_file(folder / f"{name}.safetensors") for folder in (run, out))
        assert all(torch.equal(got[n], want[n]) for n in want), name
    assert evaluations(out)[-1] == evaluations(run)[-1]


def test_an_average_that_begins_at_a_resume_begins_with_the_weights_of_then(run, tmp_path):
    """And one that ends at a resume is no longer in the checkpoints."""
    path = run / "checkpoints" / "step-17"
    without = train(tmp_path / "without", "--resume", str(path), "--steps", "18")
    assert "ema is 0.0, was 0.8" in (without / "log.txt").read_text()
    assert "ema" not in Reader(without / "checkpoints" / "step-18").keys
    begun = train(
        tmp_path / "begun", "--resume", str(without / "checkpoints" / "step-18"),
        "--steps", "19", "--ema", "0.75",
    )  # fmt: skip
    before, after, ema = (
        load_file(f)
        for f in (
            without / "model.safetensors",
            begun / "model.safetensors",
            begun / "model_ema.safetensors",
        )
    )
    for name, w in after.items():
        assert torch.allclose(ema[name], 0.75 * before[name] + 0.25 * w, atol=1e-7), name


def test_the_averages_of_a_checkpoint_score_what_the_run_said(run, capsys):
    def scored(*flags):
        assert main(["eval", *map(str, flags), "--json", "--device", "cpu"]) == 0
        return json.loads(capsys.readouterr().out)

    got, want = scored(run, "--weights", "ema", "--step", 30), evaluations(run)[-1]
    assert got["top1"] == pytest.approx(want["ema_top1"], abs=1e-8) and got["ema"]
    assert got["loss"] == pytest.approx(want["ema_loss"], rel=1e-6)
    alone = scored(run / "checkpoints" / "step-17", "--weights", "ema")["loss"]
    assert alone == scored(run, "--weights", "ema", "--step", 17)["loss"]
    assert alone != scored(run, "--step", 17)["loss"]


@pytest.mark.parametrize("value", ["1", "-0.1"])
def test_a_decay_out_of_range_is_one_sentence(value, tmp_path, capsys):
    train(tmp_path / "run", "--ema", value, code=2)
    assert "ema must be in [0, 1), got" in capsys.readouterr().err


def test_the_plan_counts_four_bytes_a_weight_and_rank(capsys):
    def planned(*flags):
        assert main(["plan", "--model", "vit_b16", "--gpus", "8", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)["memory"]

    more = planned("--backend", "zero", "--zero_stage", "2", "--ema", "0.9998")
    less = planned("--backend", "zero", "--zero_stage", "2")
    assert more["ema"] == pytest.approx(4 * 86.6e6 / 8, rel=0.01) and less["ema"] == 0
    assert more["peak"] - less["peak"] == more["ema"]
