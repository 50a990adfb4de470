"""`--augment src`: the simple random crop of DeiT III, against the whole padded picture."""

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image
from scipy.stats import chisquare

from dist_looksam.data import load
from dist_looksam.data.augment import parse, shift_crop, text
from dist_looksam.data.simple_crop import SimpleCrop
from dist_looksam.errors import ConfigError


def windows(image: Image.Image, side: int) -> dict[bytes, tuple[int, int]]:
    """Every crop of a picture whose shorter side is `side`, and its place: (x, y) of the corner."""
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    places = product(range(image.width - side + 9), range(image.height - side + 9))
    return {padded[y : y + side, x : x + side].tobytes(): (x, y) for x, y in places}


@pytest.mark.parametrize("size", [(24, 16), (16, 24)])
def test_each_window_of_the_padded_picture_is_as_likely_and_half_of_them_are_mirrored(
    tmp_path: Path, size: tuple[int, int]
):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "dog").mkdir()
        for name in ("cat", "dog"):
            picture(3, *size).save(tmp_path / split / name / "0.bmp")
    source = load("folder", tmp_path, image_size=16, augment="src,flip").train
    images, _ = source.fetch(torch.zeros(2000).long(), torch.arange(2000), True)
    places, mirrored = windows(picture(3, *size), 16), 0
    found = Counter()
    for image in images.permute(0, 2, 3, 1).numpy():
        turned = image.tobytes() not in places
        mirrored += turned
        found[places[(image[:, ::-1] if turned else image).tobytes()]] += 1
    assert set(found) == set(places.values()) and len(found) == 9 * 17
    assert chisquare(list(found.values())).pvalue > 1e-3
    assert abs(mirrored - 1000) < 5 * 500**0.5


def test_a_larger_picture_is_resized_until_its_shorter_side_is_the_image_size(tmp_path: Path):
    for split, name in product(("train", "val"), ("cat", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        picture(5, 90, 60).save(tmp_path / split / name / "0.png")
    source = load("folder", tmp_path, image_size=20, augment="src").train
    small = picture(5, 90, 60).resize((30, 20), Image.Resampling.BILINEAR)
    wanted = [np.frombuffer(w, np.uint8).astype(int) for w in windows(small, 20)]
    images, _ = source.fetch(torch.zeros(60).long(), torch.arange(60), True)
    for image in images.permute(0, 2, 3, 1).numpy():  # each pass of a resize rounds by 1 level
        assert min(abs(image.ravel() - window).max() for window in wanted) <= 1


@pytest.mark.parametrize("size", [(500, 375), (333, 1000), (224, 224), (1000, 10), (1, 1)])
def test_what_is_decoded_is_a_square_within_the_picture(size: tuple[int, int]):
    for draws in product((0.0, 0.5, 1 - 2**-53), repeat=2):
        crop = SimpleCrop(224, list(draws))
        left, top, right, bottom = crop.region(*size)
        assert left >= 0 and top >= 0 and right < size[0] + 1e-6 and bottom < size[1] + 1e-6
        assert right - left == pytest.approx(min(size)) == pytest.approx(bottom - top)
        assert crop.beyond == tuple(0 if draw == 0.5 else 8 * round(draw) - 4 for draw in draws)


def test_images_in_memory_are_shifted_by_up_to_4_pixels_of_reflection():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    moved = shift_crop(
        torch.from_numpy(image).repeat(800, 1, 1, 1), 0, torch.arange(800), simple=True
    )
    padded = np.pad(image, 4, mode="reflect")
    all_of_them = {padded[y : y + 8, x : x + 8].tobytes() for y in range(9) for x in range(9)}
    assert {one.numpy().tobytes() for one in moved[:, 0]} == all_of_them
    (source,) = [load("digits", augment="src").train]
    got = source.fetch(torch.arange(9), torch.arange(9), True)[0]
    assert got.equal(shift_crop(source.images[:9], 0, torch.arange(9), simple=True))


def test_a_run_has_one_crop():
    with pytest.raises(ConfigError, match="takes one of crop, src, got crop and src in"):
        parse("src,flip,crop")
    assert text(parse("src,flip")) == "simple crop, flip"
