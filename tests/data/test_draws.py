from itertools import pairwise

import torch

from dist_looksam.data import draws
from dist_looksam.data.draws import uniform


def test_draws_are_the_published_ones():
    """SplitMix64 in Python integers; int64 tensors must wrap around and shift to the same bits."""

    def finaliser(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, key, stream in [(0, 0, 0), (7, 123456789, 3), (2**40, 2**50 + 1, 0x10003)]:
        start = finaliser((seed + 1) * golden % 2**64)
        mixed = finaliser(
            (finaliser((key * golden + start) % 2**64) + stream * 0x94D049BB133111EB) % 2**64
        )
        drawn = uniform(seed, torch.tensor([key]), stream)
        assert drawn.dtype == torch.float64
        assert drawn.item() == (mixed >> 11) / 2**53


def test_draws_are_uniform_and_do_not_depend_on_neighbours():
    drawn = uniform(0, torch.arange(1000)[:, None], torch.arange(1000))
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, bins=100, min=0, max=1)
    chi2 = ((counts - 10_000) ** 2 / 10_000).sum()
    assert 45 < chi2 < 175  # 99 degrees of freedom: mean 99, and 5 standard deviations are 70
    centred = (drawn - 0.5) * 12**0.5
    # Each product sum is normal with standard deviation 1000; 6 of them.
    assert (centred[:-1] * centred[1:]).sum().abs() < 6000
    assert (centred[:, :-1] * centred[:, 1:]).sum().abs() < 6000


def test_seed_key_and_stream_each_change_the_draw():
    keys = torch.arange(100)
    base = uniform(0, keys, 0)
    assert base.unique().numel() == 100
    for other in (uniform(1, keys, 0), uniform(0, keys + 100, 0), uniform(0, keys, 1)):
        assert not (other[:, None] == base).any()


def test_a_row_of_streams_is_the_streams_one_by_one():
    keys = torch.tensor([5, 2**61, 7])
    rows = uniform(9, keys[:, None], 0x300 + torch.arange(4))
    for i in range(4):
        assert rows[:, i].equal(uniform(9, keys, 0x300 + i))


def test_each_purpose_has_64_stream_numbers_of_its_own_below_those_of_the_model():
    """Else one augmentation of an image would follow from another."""
    first = sorted(n for name, n in vars(draws).items() if name.isupper() and name[0] != "_")
    assert len(first) == 9 and first[-1] == draws.NOISE
    assert all(after - before >= 64 for before, after in pairwise(first))
    assert first[-2] + 64 <= 1000 < 2**16 < draws.NOISE
