"""Sums over all layers at once, as a GPU takes them, against one layer after another."""

import math

import pytest
import torch

from dist_looksam import Engine, LookSAM
from dist_looksam.maths import ascent, shards
from dist_looksam.maths.ascent import perturb_measured_
from dist_looksam.maths.shards import clones, dots, products, squares


def layers(*sizes: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(n, generator=draw).to(dtype) for n in sizes]


def test_squares_are_the_dots():
    rows = layers(5, 0, 1, 3000)
    rows[2].zero_()
    assert torch.allclose(squares(rows), dots(rows, rows), rtol=1e-6, atol=0)
    assert squares(rows).dtype == torch.float64


def test_a_rank_may_hold_nothing_of_any_layer():
    assert squares(layers(0, 0)).tolist() == [0, 0] and squares([]).shape == (0,)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
def test_a_square_that_is_not_finite_is_seen_in_its_layer(bad):
    rows = layers(5, 7)
    rows[1][3] = bad
    assert torch.isfinite(squares(rows)).tolist() == [True, False]


def test_products_of_16_bit_layers_are_summed_in_fp32():
    xs = [torch.full((4096,), 64.0, dtype=torch.float16)]
    assert products((xs, xs), (xs, clones(xs))).tolist() == [[4096.0**2], [4096.0**2]]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The sums of all layers at once, which a CPU does not take."""
    monkeypatch.setattr(shards, "on_gpu", lambda xs: True)


def test_products_are_the_same_on_a_gpu(as_on_a_gpu):
    xs = layers(5, 0, 3000)
    ys = [x.flip(0) + 1 for x in xs]
    found = products((xs, ys), (xs, xs), (ys, ys))
    for row, (a, b) in zip(found, ((xs, ys), (xs, xs), (ys, ys)), strict=True):
        want = [float(torch.dot(x.double(), y.double())) for x, y in zip(a, b, strict=True)]
        assert row.tolist() == pytest.approx(want, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("decompose", ["model", "layer"])
def test_a_look_that_finds_nothing_new_leaves_nothing_to_reuse(as_on_a_gpu, decompose):
    """At rho = 0 the gradients are equal. Were <g_s, g> and ||g||^2 rounded apart, g_v would be
    that, and the paper's reuse enlarges it to alpha ||g||."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(50, 70), torch.nn.Tanh(), torch.nn.Linear(70, 3))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = LookSAM(model.parameters(), base, rho=0.0, alpha=0.7, k=3, decompose=decompose)
    x, y = torch.randn(40, 50), torch.randint(3, (40,))
    engine = Engine(model, optimizer, lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]))
    for _ in range(7):
        seen = engine.step([(x, y)]).seen
        assert float(seen.update_norm) == pytest.approx(float(seen.grad_norm), rel=1e-6)
    assert all(not state["g_v"].any() for state in optimizer.state.values())


def test_no_layers_have_no_sums():
    assert products(([], []), ([], [])).shape == (2, 0) and dots([], []).shape == (0,)


def test_copies_have_memory_of_their_own():
    old = [*layers(3, 0), torch.randn(4, 5).t()]
    new = clones(old)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(old, new))
    new[0].zero_()
    assert old[0].abs().sum() > 0
    assert clones([]) == []


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("at_once", [1, 20, 10**6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_16_bits_show_of_eps_does_not_depend_on_how_many_layers_go_together(
    dtype, at_once, gpu, monkeypatch
):
    """Layers of which this rank has nothing may make up a batch."""
    monkeypatch.setattr(ascent, "_AT_ONCE", at_once)
    monkeypatch.setattr(shards, "on_gpu", lambda xs: gpu)
    sizes = (0, 30, 0, 0, 10, 7, 0)
    weights, eps = layers(*sizes), [0.003 * x for x in layers(*sizes)]
    eps[5] = eps[5] * 100
    started = clones(weights)
    sums = perturb_measured_(weights, iter(eps), dtype)
    for i, (w, old, e) in enumerate(zip(weights, started, eps, strict=True)):
        assert torch.equal(w, old + e)
        a = w.to(dtype).float() - old.to(dtype).float()
        want = [torch.dot(a, e), torch.dot(a, a), torch.dot(e, e)]
        assert sums[:, i].tolist() == pytest.approx([float(x) for x in want], rel=1e-6)
    assert perturb_measured_([], iter([]), dtype).shape == (3, 0)
