import numpy as np
import pytest
import torch
from pictures import picture

from dist_looksam.data.augment import Augment, flips, parse, shift_crop
from dist_looksam.data.randaugment import OPERATIONS, randaugment, randaugment_draws
from dist_looksam.errors import ConfigError


def test_words_become_settings():
    assert parse("none") == Augment()
    assert parse("auto", auto="crop,flip") == Augment(crop=True, flip=True)
    assert parse("auto") == Augment()
    assert parse("randaugment") == Augment(magnitude=9, ops=2)
    assert parse("randaugment:7.5x3, flip") == Augment(magnitude=7.5, ops=3, flip=True)
    assert parse("randaugment:4") == Augment(magnitude=4, ops=2)
    assert parse("mixup:0.8,cutmix") == Augment(mixup=0.8, cutmix=1)
    assert parse("3augment,jitter,erasing") == Augment(three=True, jitter=0.3, erasing=0.25)
    assert parse("repeat") == Augment(repeat=3) and parse("repeat:2") == Augment(repeat=2)
    assert parse("trivialaugment,jitter:0.4") == Augment(trivial=True, jitter=0.4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("flipp", "no 'flipp'"),
        ("", "no ''"),
        ("crop,auto", "auto stands alone"),
        ("none,crop", "none stands alone"),
        ("flip,flip", "flip twice"),
        ("crop:3", "crop takes no number"),
        ("randaugment:11", "from 0 to 10, got '11'"),
        ("randaugment:9x2.5", "a whole number from 1 to 8, got '2.5'"),
        ("randaugment:9x0", "a whole number"),
        ("mixup:", "mixup takes a number"),
        ("mixup:0", "mixup takes a number"),
        ("cutmix:big", "got 'big' in 'cutmix:big'"),
        ("erasing:1.5", "erasing takes a number from 0.01 to 1, got '1.5'"),
        ("repeat:1.5", "repeat takes a whole number from 1 to 16, got '1.5'"),
        ("3augment:2", "3augment takes no number"),
        ("randaugment,crop,3augment", "takes one of 3augment, randaugment, trivialaugment"),
        ("trivialaugment,randaugment", "got randaugment and trivialaugment in"),
    ],
)
def test_a_wrong_word_is_named_with_what_is_allowed(text: str, says: str):
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert says in str(error.value)
    assert "--augment" in str(error.value)
    assert "; " in str(error.value)  # then what to do


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_of_randaugment_changes_a_picture_and_repeats_itself(name: str):
    image = picture(0)
    for strength in (0.9, -0.9):
        changed = OPERATIONS[name](image, strength, (1, 2, 3))
        again = OPERATIONS[name](image, strength, (1, 2, 3))
        assert changed.size == image.size and changed.mode == "RGB"
        assert changed.tobytes() == again.tobytes()
        assert (changed.tobytes() != image.tobytes()) == (name != "identity")


def test_randaugment_at_magnitude_0_only_equalises():
    for name in set(OPERATIONS) - {"equalize", "auto_contrast"}:
        assert OPERATIONS[name](picture(0), 0.0, (0, 0, 0)).tobytes() == picture(0).tobytes(), name


def test_randaugment_draws_every_operation_and_both_signs():
    rows = randaugment_draws(0, torch.arange(400), 2)
    seen = {step for row in rows for step in randaugment(row, magnitude=7)}
    assert seen == {(name, sign * 0.7) for name in OPERATIONS for sign in (1, -1)}


def test_shift_crop_moves_each_image_by_its_own_whole_offset_of_at_most_2():
    images = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8).repeat(200, 1, 1, 1)
    moved = shift_crop(images, 0, torch.arange(200))
    padded = np.pad(images[0, 0].numpy(), 2)
    windows = {padded[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)}
    assert {image.numpy().tobytes() for image in moved[:, 0]} == windows


def test_half_of_the_samples_are_flipped():
    share = flips(0, torch.arange(10_000)).double().mean()
    assert abs(share - 0.5) < 0.025  # 5 standard deviations


def test_shift_crop_gives_every_sample_its_own_image_back():
    images = torch.arange(1, 101, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 8, 8)
    moved = shift_crop(images, 0, torch.arange(100))
    assert moved[:, :, 2:-2, 2:-2].equal(images[:, :, 2:-2, 2:-2])
