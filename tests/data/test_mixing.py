from math import sqrt

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torch.nn import functional as F

from dist_looksam.data.augment import Augment
from dist_looksam.data.batch import Batch
from dist_looksam.data.losses import cross_entropy
from dist_looksam.data.mixing import draw, mix, swap


def batch(n: int = 8, **mixed) -> Batch:
    images = torch.randint(0, 256, (n, 3, 6, 5), generator=torch.Generator().manual_seed(0))
    return Batch(
        images=images.byte(),
        labels=torch.arange(n) % 4,
        keys=torch.arange(n),
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.6, 0.7),
        **mixed,
    )


def test_images_are_normalised_per_channel():
    images = batch().to("cpu").images
    assert images.dtype == torch.float32 and images.is_contiguous()
    for channel, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))):
        expected = (batch().images[:, channel].double() / 255 - mean) / std
        assert torch.allclose(images[:, channel].double(), expected, atol=1e-6)


def test_mixing_on_the_device_is_the_formula_pixel_by_pixel():
    lam = torch.tensor([0.3, 0.3, 0.8, 0.8])
    boxes = torch.tensor([[0, 0, 0, 0]] * 2 + [[1, 2, 4, 5]] * 2)
    mixed = batch(4, lam=lam, boxes=boxes, partner=torch.tensor([1, 0, 3, 2])).to("cpu").images
    plain = batch(4).to("cpu").images
    for i in range(4):
        for y in range(6):
            for x in range(5):
                inside = i >= 2 and 1 <= y < 4 and 2 <= x < 5
                own = 0.3 if i < 2 else 1 - float(inside)
                expected = own * plain[i, :, y, x] + (1 - own) * plain[i ^ 1, :, y, x]
                assert torch.allclose(mixed[i, :, y, x], expected, atol=1e-6)


def test_a_batch_moved_twice_is_not_mixed_twice():
    once = batch(2, lam=torch.tensor([0.3, 0.3]), boxes=torch.zeros(2, 4).long()).to("cpu")
    assert once.to("cpu").images.equal(once.images)


def test_cut_boxes_cover_the_partners_share():
    lam, boxes = draw(Augment(cutmix=1), 0, torch.arange(2000), height=28, width=20)
    top, left, bottom, right = boxes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= 28).all() and (right <= 20).all()
    assert torch.allclose(1 - lam, (bottom - top) * (right - left) / (28 * 20), atol=1e-6)
    black_and_white = torch.tensor([0.0, 1.0]).repeat(1000)[:, None, None, None]
    mixed = mix(black_and_white.expand(2000, 1, 28, 20), lam, boxes)
    assert torch.allclose(mixed[0::2].mean((1, 2, 3)), 1 - lam[0::2], atol=1e-6)
    assert torch.allclose(mixed[1::2].mean((1, 2, 3)), lam[1::2], atol=1e-6)


def as_timm(random: np.random.Generator, side: int) -> list[int]:
    """A box as rand_bbox of timm's Mixup cuts it from images of side x side, alpha 1."""
    extent = int(side * sqrt(1 - random.beta(1, 1)))
    low = random.integers(0, side, 2) - extent // 2
    return [*low.clip(0, side), *(low + extent).clip(0, side)]


def test_cut_boxes_have_the_sizes_and_places_of_timms():
    lam, boxes = draw(Augment(cutmix=1), 0, torch.arange(0, 8000, 2), height=224, width=224)
    random = np.random.default_rng(0)
    expected = np.array([as_timm(random, 224) for _ in range(4000)])
    for edge in range(4):
        assert ks_2samp(boxes[:, edge].numpy(), expected[:, edge]).pvalue > 1e-3
    sides = expected[:, 2:] - expected[:, :2]
    assert ks_2samp(1 - lam.double().numpy(), sides.prod(1) / 224**2).pvalue > 1e-3
    middles = (boxes[:, :2] + boxes[:, 2:]).double().T
    assert (torch.corrcoef(torch.cat([middles, lam[None]])) - torch.eye(3)).abs().max() < 0.08
    other, _ = draw(Augment(cutmix=1), 1, torch.arange(0, 18, 2), height=224, width=224)
    assert not other.equal(lam[:9])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_follow_the_beta_distribution(alpha: float):
    lam, boxes = draw(Augment(mixup=alpha), 0, torch.arange(0, 8000, 2), height=8, width=8)
    assert not boxes.any()
    assert kstest(lam.numpy(), "beta", (alpha, alpha)).pvalue > 1e-3


def test_pairs_share_one_draw_and_a_coin_chooses_between_mixup_and_cutmix():
    lam, boxes = draw(Augment(mixup=1, cutmix=1), 0, torch.arange(4000), height=32, width=32)
    assert lam[0::2].equal(lam[1::2]) and boxes[0::2].equal(boxes[1::2])
    assert lam[0::2].unique().numel() > 900
    cut = boxes.any(1).double().mean()
    assert 0.4 < cut < 0.55  # half, less the boxes that came out empty


def test_partners_are_neighbours():
    assert swap(torch.tensor([5, 6, 7, 8])).tolist() == [6, 5, 8, 7]


def test_loss_of_a_mixed_sample_is_shared_between_both_labels():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    lam, partner = torch.tensor([0.25, 0.25, 1.0, 1.0]), torch.tensor([1, 0, 3, 2])
    mixed = batch(4, lam=lam, partner=partner, boxes=torch.zeros(4, 4).long())
    soft = lam[:, None] * F.one_hot(mixed.labels, 4) + (1 - lam[:, None]) * F.one_hot(partner, 4)
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits, soft * (1 - smoothing) + smoothing / 4)
        got = cross_entropy(logits, mixed, label_smoothing=smoothing)
        assert torch.allclose(got, expected, atol=1e-6)


def test_loss_of_half_precision_logits_is_computed_in_float32():
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    loss = cross_entropy(logits, batch())
    assert loss.dtype == torch.float32
    # float32 rounds at 1e-7, bfloat16 at 4e-3
    assert torch.allclose(loss, F.cross_entropy(logits.float(), batch().labels), rtol=1e-6)
