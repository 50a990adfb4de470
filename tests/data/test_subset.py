"""--train_images and --holdout: fewer training images, and some kept aside to evaluate on."""

import json

import pytest
import torch

from dist_looksam.data import load
from dist_looksam.errors import ConfigError
from dist_looksam.run import train


def pixels(source) -> torch.Tensor:
    indices = torch.arange(len(source))
    return source.fetch(indices, indices, False)[0]


def rows(images: torch.Tensor) -> set[bytes]:
    return {bytes(image.numpy().tobytes()) for image in images}


def test_held_out_images_are_training_images_that_are_not_trained_on():
    whole, cut = load("digits"), load("digits", holdout=300)
    assert len(cut.train) == len(whole.train) - 300 and len(cut.test) == 300
    train, held, test = rows(pixels(cut.train)), rows(pixels(cut.test)), rows(pixels(whole.test))
    assert train | held == rows(pixels(whole.train))
    assert not train & held and not held & (test - train)
    assert torch.equal(cut.test.fetch(torch.arange(5), torch.arange(5), False)[1],
                       cut.test.labels[:5])  # fmt: skip


def test_the_same_images_are_held_out_for_every_seed():
    one, other = (load("digits", holdout=300, seed=seed) for seed in (0, 7))
    assert torch.equal(pixels(one.test), pixels(other.test))


@pytest.mark.parametrize("holdout", [1437, 5000])
def test_holding_out_everything_is_one_sentence(holdout):
    with pytest.raises(ConfigError, match=f"from 0 to 1436.*got {holdout}"):
        load("digits", holdout=holdout)


def test_one_image_left_is_enough():
    data = load("digits", holdout=1436)
    assert len(data.train) == 1 and len(data.test) == 1436


@pytest.mark.parametrize("holdout", [0, 100])
def test_fewer_training_images_are_part_of_more_and_leave_the_test_images_alone(holdout):
    few, more, whole = (load("digits", train_images=n, holdout=holdout) for n in (300, 700, None))
    assert [len(d.train) + holdout for d in (few, more, whole)] == [300, 700, 1437]
    assert rows(pixels(few.train)) < rows(pixels(more.train)) < rows(pixels(whole.train))
    if not holdout:
        assert torch.equal(pixels(few.test), pixels(whole.test))
    else:
        assert len(few.test) == 100
        assert rows(pixels(few.test)) <= rows(pixels(load("digits", train_images=300).train))


@pytest.mark.parametrize("given, says", [
    ({"train_images": 1438}, "train_images must be from 1 to the 1437 there are, got 1438"),
    ({"train_images": 300, "holdout": 300}, "holdout must be from 0 to 299.*got 300"),
])  # fmt: skip
def test_more_images_than_there_are_is_one_sentence(given, says):
    with pytest.raises(ConfigError, match=says):
        load("digits", **given)


def test_the_program_trains_on_no_more_than_it_was_told(tmp_path):
    flags = ["--data", "digits", "--train_images", "64", "--batch_size", "32", "--epochs", "2"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4
