"""`dist-looksam eval`: the run's own accuracy, on any number of ranks, of any kind of weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dist_looksam import models
from dist_looksam.checkpoint import form
from dist_looksam.cli.main import main
from dist_looksam.data import EvalLoader, load
from dist_looksam.run.train import main as train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose accuracy is not that of its weights in 16 bits, nor of its training images."""
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--data", "digits", "--optimizer", "adamw", "--steps", "40", "--save_every", "20"]
    assert train([*flags, "--device", "cpu", "--drop_path", "0.5", "--out", str(out)]) == 0
    return out


def scored(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert main(["eval", *map(str, arguments), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def logits_of(run: Path) -> tuple[np.ndarray, np.ndarray]:
    data = load("digits", augment="none")
    model = models.create("vit_8", num_classes=10, image_shape=(1, 8, 8)).eval()
    model.load_state_dict(load_file(run / "model.safetensors"))
    loader = EvalLoader(data.test, micro_batch=360, rank=0, ranks=1, pin=False)
    with torch.no_grad():
        logits = [models.call(model, batch.to("cpu").images, None) for batch in loader]
    loader.close()
    return torch.cat(logits).double().numpy(), data.test.labels.numpy()


def test_scores_are_those_of_numpy_over_whole_arrays_and_the_picture_is_drawn(
    run, capsys, tmp_path
):
    """ECE by the definition of Guo et al. (2017), eq. 5, with 15 bins."""
    found = scored(capsys, run, "--out", tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text()) == found
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    logits, labels = logits_of(run)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    answers, sure = shares.argmax(1), shares.max(1)
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (sure > low) & (sure <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs((answers == labels)[inside].mean() - sure[inside].mean())
    assert found["calibration_error"] == pytest.approx(error, abs=1e-6)
    assert found["calibration_error"] > 0.02
    assert found["loss"] == pytest.approx(-np.log(shares[range(360), labels]).mean(), rel=1e-6)
    order = np.argsort(-logits, axis=1)[:, :5]
    assert found["top5"] == (order == labels[:, None]).any(1).mean() < 1
    for c, row in enumerate(found["classes"]):
        of_class = answers[labels == c]
        assert row["images"] == len(of_class) and row["top1"] == (of_class == c).mean()
        assert row["answers"] == {str(a): (of_class == a).sum() for a in {*of_class.tolist()}}


def test_one_and_three_ranks_print_the_runs_own_top1_to_the_last_image(run, capsys):
    found = scored(capsys, run)
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["top1"] == summary(run)["top1"] and found["images"] == 360
    assert found["top5"] == summary(run)["top5"] < 1
    assert found["top5"] == pytest.approx(line["eval_top5"])
    assert found["loss"] == pytest.approx(line["eval_loss"], rel=1e-6)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone"]
    command += ["-m", "dist_looksam.cli.main", "eval", str(run), "--device", "cpu", "--json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    three = json.loads(done.stdout)
    assert three.pop("ranks") == 3 and found.pop("ranks") == 1
    for name in ("loss", "calibration_error"):
        assert three.pop(name) == pytest.approx(found.pop(name), rel=1e-5)
    assert three == found


def older(run: Path) -> None:
    """As versions wrote it that stored no card, and knew fewer settings."""
    weights = load_file(run / "model.safetensors")
    save_file(weights, run / "model.safetensors")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("train_images", "holdout", "image_size", "precision"):
        del config[name]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    manifest = run / "checkpoints" / "step-40" / "manifest.json"
    content = form.read_json(manifest)
    del content["extra"]["card"], content["extra"]["settings"]["precision"]
    form.write_json(manifest, content)


def test_checkpoints_files_and_runs_of_older_versions_give_the_same_numbers(run, capsys, tmp_path):
    want = scored(capsys, run)
    old = tmp_path / "old"
    shutil.copytree(run, old)
    older(old)
    shutil.copy(run / "model.safetensors", tmp_path / "alone.safetensors")
    shutil.copy(old / "model.safetensors", tmp_path / "bare.safetensors")
    shutil.copy(run / "model.safetensors", old / "model_ema.safetensors")
    last = "checkpoints/step-40"
    for arguments in (
        (run / last,),
        (run, "--step", 40),
        (run / "model.safetensors",),
        (tmp_path / "alone.safetensors",),
        (tmp_path / "bare.safetensors", "--model", "vit_8", "--data", "digits"),
        (old,),
        (old / last,),
        (old, "--weights", "ema"),
    ):
        got = scored(capsys, *arguments)
        assert (got["top1"], got["classes"]) == (want["top1"], want["classes"]), arguments
    assert scored(capsys, run, "--step", 20)["loss"] > want["loss"]
    assert scored(capsys, run, "--holdout", 100)["images"] == 100
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"top1 {want['top1']:.4f}" in printed and "mistaken for" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["RUN", "--weights", "ema"], r"hold model_ema.safetensors, .*leave out --weights ema"),
        (["RUN", "--weights", "ema", "--step", "40"], r"averages of the weights, got .*/step-40, "),
        (["RUN/model.safetensors", "--weights", "ema"], r"--step and --weights choose among"),
        (["RUN/model.safetensors", "--step", "40"], r"--step and --weights choose among"),
        (["RUN/none"], r"none, which does not exist"),
        (["BARE"], r"bare.safetensors does not say its model; name it with --model"),
        (["BARE", "--model", "vit_8"], r"does not say its data; name it with --data"),
        (["BARE", "--model", "vit_28", "--data", "digits"], r"weights must be|cuts images"),
        (["RUN", "--micro_batch", "0"], r"micro_batch must be >= 1, got 0"),
        (["RUN", "--data_dir", "x"], r"takes no --data_dir"),
    ],
)
def test_a_mistake_is_one_sentence_with_exit_code_2(run, capsys, tmp_path, arguments, sentence):
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(run / "model.safetensors"), bare)
    capsys.readouterr()
    given = [a.replace("RUN", str(run)).replace("BARE", str(bare)) for a in arguments]
    assert main(["eval", *given]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error) and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.needs("fashion_mnist")
def test_data_of_other_classes_are_refused(run, capsys):
    """Ten classes of ten: the shapes of the head fit."""
    assert main(["eval", str(run), "--data", "fashion_mnist"]) == 2
    assert "data must have the class_names that" in capsys.readouterr().err
