"""A run with the augmentations of DeiT III on a folder of JPEGs: what it says, how it resumes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dist_looksam.cli.main import main

DEIT = "crop,flip,3augment,jitter,erasing,mixup:0.8,cutmix,repeat:3"
FLAGS = ["train", "--data", "folder", "--image_size", "16", "--device", "cpu", "--workers", "1"]
FLAGS += ["--optimizer", "look_sam", "--steps", "12", "--batch_size", "12", "--save_every", "5"]
FLAGS += ["--augment", DEIT, "--mixup_until", "0.75", "--image_size_from", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root, random = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for split, number in (("train", 9), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                levels = random.integers(0, 256, (4, 5, 3)).astype(np.uint8)
                image = Image.fromarray(levels).resize((40, 32), Image.Resampling.BICUBIC)
                image.save(root / split / name / f"{i}.jpg")
    return root


def train(folder: Path, out: Path, *flags: str, code: int = 0) -> Path:
    assert main([*FLAGS, "--data_dir", str(folder), "--out", str(out), *flags]) == code
    return out


def lines(out: Path) -> list[dict]:
    kept = ("step", "epoch", "loss", "eval_loss", "eval_top1")
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{name: row[name] for name in kept if name in row} for row in rows]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    return train(folder, tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_resumed_run_of_deits_augmentations_ends_with_the_same_weights_to_the_bit(
    folder, run, tmp_path, place
):
    """Wherever they are made before and after."""
    more = ["--resume", str(run / "checkpoints" / "step-5"), "--augment_on", place]
    again = train(folder, tmp_path / "again", *more)
    changed = "augment_on is device, was host when the checkpoint was written"
    assert (changed in (again / "log.txt").read_text()) == (place == "device")
    assert lines(again) == [line for line in lines(run) if line["step"] >= 5]
    want, got = (load_file(out / "model.safetensors") for out in (run, again))
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert "mixup_until: 9\n" in (run / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("augment", "says"),
    [("mixup,repeat:2", "got 2 instead of 3; add repeat:3 to --augment"),
     ("mixup", "got 1 instead of 3; add repeat:3 to --augment")],
)  # fmt: skip
def test_a_resumed_run_must_repeat_images_as_often(folder, run, tmp_path, capsys, augment, says):
    more = ["--resume", str(run / "checkpoints" / "step-5"), "--augment", augment]
    train(folder, tmp_path / "again", *more, code=2)
    assert says in capsys.readouterr().err
    assert main([*FLAGS, "--data_dir", str(folder), *more, "--dry_run"]) == 2
    assert says in capsys.readouterr().err


def test_a_resumed_run_must_grow_its_images_alike(folder, run, tmp_path, capsys):
    more = ["--resume", str(run / "checkpoints" / "step-5"), "--image_size_from", "12"]
    train(folder, tmp_path / "again", *more, code=2)
    assert "image_size_from must be as in the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--data", "digits"], "image_size_from is not for data digits, whose images have one size"),
     (["--compile", "blocks"], "image_size_from is not for compile blocks"),
     (["--image_size_from", "9"], "multiple of the model's patch of 2 below image_size.* got 9"),
     (["--image_size_from", "0"], "image_size_from must be >= 1")],
)  # fmt: skip
def test_images_that_cannot_grow_are_one_sentence(folder, flags, says, capsys):
    own = ["--data_dir", str(folder)] * ("digits" not in flags)
    assert main([*FLAGS, "--augment", "mixup", *own, *flags, "--dry_run"]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_other_augmentation_may_change_at_a_resume_and_is_noted(folder, run, tmp_path):
    more = ["--augment", "flip,cutmix,repeat:3", "--mixup_until", "8", "--steps", "10"]
    out = train(folder, tmp_path / "out", *more, "--resume", str(run / "checkpoints" / "step-5"))
    log = (out / "log.txt").read_text()
    assert "augment is flip,cutmix,repeat:3, was crop,flip,3augment" in log
    assert "images grow over 10 steps, not 12" in log
    assert "mixup_until is 8, was 9 when the checkpoint was written" in log


def test_a_dry_run_says_what_is_done_to_the_images_and_what_an_epoch_is(folder, capsys):
    assert main([*FLAGS, "--data_dir", str(folder), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert (
        "augmented   crop, flip, 3-Augment, colours by up to 30%, erasing of 25% of the images, "
        "mixup 0.8 or cutmix 1 before step 9\n"
    ) in out
    assert (
        "repeated    4 images 3 times in a batch, augmented anew; an epoch is 18 of them, so 3 "
        "epochs show every image 3 times\n"
    ) in out
    assert main([*FLAGS, "--data_dir", str(folder), "--augment_on", "device", "--dry_run"]) == 0
    said = "crop, flip, 3-Augment on the device, colours by up to 30% on the device, erasing"
    assert f"augmented   {said}" in capsys.readouterr().out
    assert "sizes       5, from 8 to 16 pixels by 2, each for about 2 steps\n" in out
    assert "12 steps, 8 epochs" in out and "to read     " in out
