"""Sums over all layers at once, as a GPU takes them, against one layer after another."""

import math

import pytest
import torch

from dist_looksam.maths.shards import copies, dots, products, squares
from dist_looksam.optim import seen
from dist_looksam.optim.seen import perturb_seen_in_


def layers(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(n, generator=draw).to(dtype) for n in sizes]


def test_squares_are_the_dots():
    rows = layers(5, 0, 1, 3000)
    rows[2].zero_()
    assert torch.allclose(squares(rows), dots(rows, rows), rtol=1e-6, atol=0)
    assert squares(rows).dtype == torch.float64


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
def test_a_square_that_is_not_finite_is_seen_in_its_layer(bad):
    rows = layers(5, 7)
    rows[1][3] = bad
    assert torch.isfinite(squares(rows)).tolist() == [True, False]


def test_products_of_16_bit_layers_are_summed_in_fp32():
    xs = [torch.full((4096,), 64.0, dtype=torch.float16)]
    assert products((xs, xs), (xs, copies(xs))).tolist() == [[4096.0**2], [4096.0**2]]


def test_no_layers_have_no_sums():
    assert products(([], []), ([], [])).shape == (2, 0) and dots([], []).shape == (0,)


def test_copies_have_memory_of_their_own():
    old = [*layers(3, 0), torch.randn(4, 5).t()]
    new = copies(old)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(old, new))
    new[0].zero_()
    assert old[0].abs().sum() > 0
    assert copies([]) == []


@pytest.mark.parametrize("at_once", [1, 20, 10**6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_16_bits_show_of_eps_does_not_depend_on_how_many_layers_go_together(
    dtype, at_once, monkeypatch
):
    monkeypatch.setattr(seen, "_AT_ONCE", at_once)
    weights, eps = layers(10, 0, 7, 30), [0.003 * x for x in layers(10, 0, 7, 30)]
    eps[2] = eps[2] * 100
    started = copies(weights)
    sums = perturb_seen_in_(weights, iter(eps), dtype)
    for i, (w, old, e) in enumerate(zip(weights, started, eps, strict=True)):
        assert torch.equal(w, old + e)
        a = w.to(dtype).float() - old.to(dtype).float()
        want = [torch.dot(a, e), torch.dot(a, a), torch.dot(e, e)]
        assert sums[:, i].tolist() == pytest.approx([float(x) for x in want], rel=1e-6)
