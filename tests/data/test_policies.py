"""TrivialAugment, 3-Augment and colour jitter: what is drawn, how often, and what it does."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from pictures import jpeg, picture
from PIL import ImageEnhance, ImageFilter

from dist_looksam.data.augment import Augment, parse
from dist_looksam.data.pictures import Change
from dist_looksam.data.policies import change, change_batch, draw
from dist_looksam.data.randaugment import OPERATIONS

KEYS = torch.arange(6000)
SIGNED = {"shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color"}
SIGNED |= {"contrast", "sharpness"}


def alike(counts: Counter, number: int) -> bool:
    """Whether `number` outcomes are equally frequent, within 5 standard deviations."""
    expected = sum(counts.values()) / number
    return len(counts) == number and all(
        abs(count - expected) < 5 * expected**0.5 for count in counts.values()
    )


def test_trivialaugment_draws_all_operations_31_strengths_and_both_signs_alike(monkeypatch):
    drawn = []
    for name in OPERATIONS:
        monkeypatch.setitem(
            OPERATIONS, name, lambda image, s, fill, name=name: drawn.append((name, s)) or image
        )
    image = picture(0)
    for row in draw(Augment(trivial=True), 0, KEYS):
        change(image, row, Augment(trivial=True), fill=0)
    assert alike(Counter(name for name, _ in drawn), 14)
    of_rotate = [s for name, s in drawn if name == "rotate"]
    assert alike(Counter(round(abs(s) / 4.5 * 30) for s in of_rotate), 31)
    assert alike(Counter(np.sign(s) for s in of_rotate if s), 2)


@pytest.mark.parametrize(
    ("name", "widest", "unit"),
    [
        ("rotate", 135, 30), ("shear_x", 0.99, 0.3), ("shear_y", 0.99, 0.3),
        ("translate_x", 32, 0.45 * 224), ("translate_y", 32, 0.45 * 224), ("posterize", 6, 4),
        ("solarize", 256, 256), ("brightness", 0.99, 0.9), ("color", 0.99, 0.9),
        ("contrast", 0.99, 0.9), ("sharpness", 0.99, 0.9),
    ],
)  # fmt: skip
def test_trivialaugments_widest_changes_are_those_of_torchvision(monkeypatch, name, widest, unit):
    """unit: what strength 1 of randaugment.OPERATIONS is."""
    strengths = []
    monkeypatch.setitem(OPERATIONS, name, lambda image, s, fill: strengths.append(s) or image)
    place = (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)
    for sign in (0.4, 0.6):
        change(picture(0), [place, 0.999, sign], Augment(trivial=True), fill=0)
    assert np.array(strengths) * unit == pytest.approx([widest, -widest])


def test_what_comes_in_from_outside_of_a_picture_has_imagenets_mean_colour():
    augment, place = Augment(trivial=True), list(OPERATIONS).index("translate_x")
    row = [(place + 0.5) / len(OPERATIONS), 0.999, 0.1]  # by 1/7 of the side, to the left
    out = np.empty((56, 56, 3), np.uint8)
    Change(policy=row, augment=augment).write(out, jpeg(0), in_c=False)
    assert (out[:, -8:] == [124, 116, 104]).all() and not (out[:, :-8] == [124, 116, 104]).all(
        2
    ).any()


def test_3augment_makes_a_third_grey_a_third_solarized_and_blurs_a_third():
    image = picture(1)
    pixels = np.asarray(image)
    grey = np.asarray(image.convert("L"))[..., None].repeat(3, 2)
    solar = np.where(pixels < 128, pixels, 255 - pixels)
    kinds, radii = Counter(), []
    for row in draw(Augment(three=True), 0, KEYS[:1500]):
        changed = np.asarray(change(image, row, Augment(three=True), fill=0))
        if np.array_equal(changed, grey):
            kinds["grey"] += 1
        elif np.array_equal(changed, solar):
            kinds["solar"] += 1
        else:
            radii.append(0.1 + 1.9 * row[1])
            blurred = image.filter(ImageFilter.GaussianBlur(radii[-1]))
            assert np.array_equal(changed, np.asarray(blurred))
            kinds["blur"] += 1
    assert alike(kinds, 3)
    assert 0.1 <= min(radii) < 0.15 and 1.95 < max(radii) <= 2


def test_jitter_scales_brightness_contrast_and_saturation_in_the_drawn_order():
    image = picture(2)
    luma = np.array([0.299, 0.587, 0.114])
    formulas = (
        lambda x, f: x * f,
        lambda x, f: (x @ luma).mean() * (1 - f) + x * f,
        lambda x, f: (x @ luma)[..., None] * (1 - f) + x * f,
    )
    orders, factors = Counter(), []
    for row in draw(Augment(jitter=0.3), 0, KEYS[:400]):
        expected = np.asarray(image).astype(float)
        order = list(permutations(range(3)))[int(6 * row[3])]
        orders[order] += 1
        factors += [0.7 + 0.6 * number for number in row[:3]]
        for kind in order:
            expected = formulas[kind](expected, factors[kind - 3]).clip(0, 255)
        changed = np.asarray(change(image, row, Augment(jitter=0.3), fill=0)).astype(float)
        assert abs(changed - expected).max() <= 5  # Pillow rounds each of three steps down
    assert alike(orders, 6)
    assert 0.7 <= min(factors) < 0.71 and 1.29 < max(factors) <= 1.3


def test_jitter_comes_after_the_policy():
    augment = parse("3augment,jitter:0.5")
    (row,) = draw(augment, 0, torch.tensor([7]))
    image = picture(3)
    grey = change(image, row[:2], Augment(three=True), fill=0)
    expected = change(grey, row[2:], Augment(jitter=0.5), fill=0)
    assert change(image, row, augment, fill=0).tobytes() == expected.tobytes()
    assert expected.tobytes() != grey.tobytes()
    assert ImageEnhance.Brightness(image).enhance(1).tobytes() == image.tobytes()


@pytest.mark.parametrize("text", ["randaugment,jitter", "trivialaugment", "3augment", "jitter"])
def test_grey_images_in_memory_are_changed_each_by_its_key_alone(text: str):
    images = torch.arange(64, dtype=torch.uint8).mul(4).reshape(1, 1, 8, 8).repeat(40, 1, 1, 1)
    keys, augment = torch.arange(40) + 100, parse(text)
    changed = change_batch(images, augment, 0, keys)
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in changed}) > 5
    assert change_batch(images[5:7], augment, 0, keys[5:7]).equal(changed[5:7])
    assert not change_batch(images, augment, 1, keys).equal(changed)
