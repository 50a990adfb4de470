"""What is wrong with the settings is said before data is read."""

import importlib.util
import sys

import pytest

from dist_looksam.cli import main as cli
from dist_looksam.run.train import main

# What is wrong, and what the sentence says. `folder` has no train/, which reading it would find.
WRONG = {
    "model": (["--model", "vit_x"], "model must be one of auto"),
    "patch": (["--model", "vit_s16", "--image_size", "225"], "16x16 patches, got 225x225"),
    "m": (["--m", "5", "--micro_batch", "8", "--batch_size", "64"], "m must divide a micro-batch"),
    "m of msam": (
        ["--optimizer", "msam", "--m", "64"],
        "must be the whole batch with an ascent along",
    ),
    "fp16": (["--zero_stage", "0", "--precision", "fp16"], "fp16 needs ZeRO stage 1, 2 or 3"),
    "batch": (["--batch_size", "9", "--micro_batch", "2"], "got 9; use 8 or 10"),
    "pairs": (["--batch_size", "9", "--augment", "mixup"], "micro_batch must be even"),
    "augment": (["--augment", "crop,blur"], "--augment knows no 'blur'"),
    "ranks": (["--deepspeed_config", "/no/such"], "deepspeed_config"),
    "resume": (["--resume", "/no/such"], "resume must be auto, none or a complete checkpoint"),
    "cuda": (["--device", "cuda"], "device cuda was asked for, got no CUDA device"),
}
_watched: list[str] = []
_seen: list[str] = []


def _hook(event: str, arguments: tuple) -> None:
    listing = _watched and event in ("os.scandir", "os.listdir")
    if listing and str(arguments[0]).startswith(_watched[0]):
        _seen.append(str(arguments[0]))


sys.addaudithook(_hook)


@pytest.fixture
def folder(tmp_path):
    """A data folder whose listing is noticed."""
    (tmp_path / "data").mkdir()
    _watched[:], _seen[:] = [str(tmp_path / "data")], []
    yield tmp_path / "data"
    _watched.clear()
    assert not _seen


@pytest.fixture
def flags(folder, tmp_path):
    return ["--data", "folder", "--data_dir", str(folder), "--out", str(tmp_path / "out")]


@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["start", "dry_run"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_told_before_an_image_folder_is_listed(name, dry, flags, capfd):
    """1.28 million files were listed before a misspelt model was noticed."""
    wrong, says = WRONG[name]
    if dry and name in ("resume", "cuda"):
        pytest.skip("a dry run reads what it can, and needs no device")
    import torch

    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    assert main([*flags, *wrong, *dry]) == 2
    assert says in capfd.readouterr().err


@pytest.mark.parametrize("backend", ["zero", "horovod"])
def test_a_missing_library_is_told_before_an_image_folder_is_listed(
    backend, flags, capfd, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*flags, "--backend", backend]) == 2
    assert f"backend {backend} needs " in capfd.readouterr().err


def test_what_the_settings_do_not_show_is_found_in_the_data(flags, tmp_path, capfd):
    (tmp_path / "data" / "val").mkdir()
    assert main(flags) == 2
    assert "has no folder train" in capfd.readouterr().err


def test_a_folder_that_is_not_listed_yet_is_not_taken_for_imagenet(flags, capfd):
    """More training images than ImageNet has must not be refused before the folder is listed."""
    assert main([*flags, "--train_images", "5000000"]) == 2
    assert "has no folder train" in capfd.readouterr().err


def test_cost_counts_the_run_that_the_flags_mean(capfd):
    """It opened the data with three flags of seven, and so counted on other images."""
    flags = ["--data", "digits", "--model", "vit_8", "--batch_size", "8"]
    assert cli.main(["cost", *flags, "--train_images", "5000"]) == 2
    assert "train_images must be from 1 to the 1437 there are" in capfd.readouterr().err
    assert cli.main(["cost", *flags, "--train_images", "20", "--holdout", "20"]) == 2
    assert "holdout must be from 0 to 19" in capfd.readouterr().err
