"""Random erasing: its boxes follow timm's loop, its noise the sample's key."""

from math import exp, log, sqrt

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from test_mixing import batch

from dist_looksam.data.erasing import draw, erase_, num_pixels
from dist_looksam.data.mixing import mix


def as_timm(random: np.random.Generator, height: int, width: int) -> tuple[int, int]:
    """Height and width of a box: up to 10 tries to fit one in, as RandomErasing of timm."""
    for _ in range(10):
        area = random.uniform(0.02, 1 / 3) * height * width
        aspect = exp(random.uniform(log(0.3), log(1 / 0.3)))
        h, w = round(sqrt(area * aspect)), round(sqrt(area / aspect))
        if h < height and w < width:
            return h, w
    return 0, 0


def places_and_sizes(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[4, n]: where the box lies, from top and left, as shares of its room; its area and ratio."""
    top, left, bottom, right = boxes.double().unbind(1)
    h, w = bottom - top, right - left
    place = (top + 0.5) / (height - h + 1), (left + 0.5) / (width - w + 1)
    return torch.stack([*place, (h * w).log(), (h / w).log()])


def test_a_quarter_of_the_images_is_erased_whatever_their_boxes_are():
    boxes = draw(0.25, 0, torch.arange(10_000), height=224, width=224)
    erased = boxes.any(1)
    assert erased.double().mean() == pytest.approx(0.25, abs=0.022)  # 5 deviations
    all_of_them = draw(1.0, 0, torch.arange(10_000), height=224, width=224)
    assert boxes[erased].equal(all_of_them[erased])
    drawn = torch.cat([erased[None], places_and_sizes(all_of_them, 224, 224)])
    assert (torch.corrcoef(drawn) - torch.eye(5)).abs().max() < 0.05  # 5 deviations
    assert num_pixels(draw(1.0, 0, torch.arange(10), height=1, width=1)) == 0  # none fits


@pytest.mark.parametrize(("height", "width"), [(224, 224), (224, 96)])
def test_boxes_have_the_sizes_and_places_of_timms(height: int, width: int):
    boxes = draw(1.0, 0, torch.arange(4000), height=height, width=width).double()
    top, left, bottom, right = boxes.unbind(1)
    h, w = bottom - top, right - left
    random = np.random.default_rng(0)
    expected = np.array([as_timm(random, height, width) for _ in range(4000)])
    for got, want in ((h * w, expected.prod(1)), (h / w, expected[:, 0] / expected[:, 1])):
        assert kstest(got.numpy(), want).pvalue > 1e-3
    assert (top >= 0).all() and (left >= 0).all()
    assert (bottom <= height).all() and (right <= width).all()
    assert (h < height).all() and (w < width).all()
    assert (bottom == height).any() and (right == width).any() and not boxes[:, :2].all(0).any()
    for place in places_and_sizes(boxes, height, width)[:2]:
        assert kstest(place.numpy(), "uniform").pvalue > 1e-3


def test_boxes_are_filled_with_normal_noise_of_each_pixel_and_nothing_else_is_touched():
    keys = torch.arange(50, 90)
    boxes = draw(0.5, 3, keys, height=32, width=24)
    images = torch.full((40, 3, 32, 24), 9.0)
    erase_(images, boxes, 3, keys, pixels=num_pixels(boxes))
    inside = torch.zeros(40, 3, 32, 24, dtype=torch.bool)
    for image, (top, left, bottom, right) in zip(inside, boxes.tolist()):
        image[:, top:bottom, left:right] = True
    assert (images[~inside] == 9).all() and inside.any()
    noise = images[inside]
    assert noise.unique().numel() > 0.99 * noise.numel()
    assert kstest(noise.numpy(), "norm").pvalue > 1e-3
    some = torch.full((2, 3, 32, 24), 9.0)  # of a sample, in any batch
    erase_(some, boxes[11:13], 3, keys[11:13], pixels=num_pixels(boxes[11:13]))
    assert some.equal(images[11:13])
    erase_(some, boxes[11:13], 4, keys[11:13], pixels=num_pixels(boxes[11:13]))
    assert not some.equal(images[11:13])
    assert not draw(0.5, 4, keys, height=32, width=24).equal(boxes)


def test_a_batch_is_normalised_then_erased_then_mixed():
    lam, boxes = torch.tensor([0.3, 0.3]), torch.zeros(2, 4).long()
    erased = torch.tensor([[1, 1, 4, 3], [0, 0, 0, 0]])
    mixed = {"lam": lam, "boxes": boxes, "partner": torch.tensor([1, 0])}
    expected = batch(2).to("cpu").images
    erase_(expected, erased, 5, torch.arange(2), pixels=6)
    assert expected[0, :, 1:4, 1:3].unique().numel() == 18
    got = batch(2, erased=erased, seed=5, **mixed).to("cpu").images
    assert got.equal(mix(expected, lam, boxes))
