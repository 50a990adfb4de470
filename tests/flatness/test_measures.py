"""What `dist-looksam flatness` measures, against dense matrices, NumPy and computations by hand."""

import numpy as np
import pytest
import reference
import torch
from torch import nn

from dist_looksam.flatness.measures import Measurement, Wanted, matrices
from dist_looksam.flatness.objective import Objective, Part, flat
from dist_looksam.maths.directions import filter_normalised, scaled_to
from dist_looksam.maths.rounding import rounded
from dist_looksam.maths.spectrum import lanczos, mean_and_error, signs

SAMPLES, M, PIXELS, CLASSES = 24, 8, 6, 3
RHO, LAYER_RHO = 0.3, 0.1


def part(seed: int, samples: int, groups: int) -> Part:
    draws = torch.Generator().manual_seed(seed)
    return Part(
        images=torch.randint(256, (samples, 1, 2, 3), generator=draws, dtype=torch.uint8),
        labels=torch.randint(CLASSES, (samples,), generator=draws),
        ends=[c * samples // groups for c in range(groups + 1)],
        mean=(0.4,),
        std=(0.3,),
    )


def objective(*layers: nn.Module, dtype=torch.float64) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *(layers or [nn.Linear(PIXELS, CLASSES)]))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    model.to(dtype)
    parts = part(1, SAMPLES, SAMPLES // M), part(2, 10, SAMPLES // M)
    return Objective(model, *parts, total=lambda x: x, micro_batch=5)


def tiny(dtype=torch.float64) -> Objective:
    return objective(nn.Linear(PIXELS, 5), nn.Tanh(), nn.Linear(5, CLASSES), dtype=dtype)


def wanted(**changes) -> Wanted:
    settings = {
        "samples": SAMPLES, "test_samples": 10, "m": M, "rho": (RHO,), "layer_rho": (LAYER_RHO,),
        "eigenvalues": 3, "iterations": 60, "tolerance": 1e-3, "probes": 30, "points": 3,
        "precision": "fp64", "seed": 0,
    }  # fmt: skip
    return Wanted(**settings | changes)


def measured(of: Objective, **changes) -> dict:
    return Measurement(of, wanted(**changes), lambda cost, what: None).all()


def hessian(of: Objective) -> torch.Tensor:
    """Dense, by the gradient's Jacobian in one piece."""
    images = (of.train.images.double() / 255 - 0.4) / 0.3

    def loss(vector):
        weights = dict(zip(dict(of.model.named_parameters()), of.split(vector)))
        out = torch.func.functional_call(of.model, weights, (images,))
        return nn.functional.cross_entropy(out, of.train.labels)

    return torch.autograd.functional.hessian(loss, flat(of.saved).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_eigenvalues_are_those_of_the_dense_hessian(dtype):
    of = tiny(dtype)
    found = measured(of)["eigenvalues"]
    true = torch.linalg.eigvalsh(hessian(tiny())).flip(0)
    assert found["converged"] and found["iterations"] < len(true)
    torch.testing.assert_close(torch.tensor(found["largest"]), true[:3].float(), rtol=0.02, atol=0)
    for value, residual, exact in zip(found["largest"], found["residuals"], true.tolist()):
        assert abs(value - exact) <= residual + 1e-5 * abs(exact)


def test_without_enough_products_the_eigenvalues_say_that_they_have_not_converged():
    found = measured(tiny(), iterations=3)["eigenvalues"]
    assert not found["converged"] and found["iterations"] == 3


def test_lanczos_ends_where_its_vectors_span_the_space_and_keeps_equal_eigenvalues_apart():
    matrix = torch.diag(torch.tensor([4.0, 4.0, 2.0, -1.0], dtype=torch.float64))
    *_, last = lanczos(lambda v: matrix @ v, torch.ones(4, dtype=torch.float64))
    assert last.values.tolist() == pytest.approx([4.0, 2.0, -1.0])  # one start reaches one of two
    assert float(last.residuals.max()) < 1e-12


def test_the_trace_is_that_of_the_dense_hessian_within_its_standard_error():
    trace = measured(tiny(), probes=200)["trace"]
    true = float(hessian(tiny()).trace())
    assert trace["standard_error"] < 0.1 * true
    assert abs(trace["mean"] - true) < 3 * trace["standard_error"]


def test_signs_and_their_mean():
    drawn = signs(1000, seed=3)
    assert set(drawn.tolist()) == {-1.0, 1.0} and abs(float(drawn.mean())) < 0.1
    assert mean_and_error(torch.tensor([1.0, 3.0])) == (2.0, pytest.approx(1.0))
    assert mean_and_error(torch.tensor([1.0])) == (1.0, None)


# The loss around w, against NumPy.


def softmax_loss(w, b, images, labels):
    """Mean loss, share of right answers and gradients of softmax regression."""
    x = (images.reshape(len(images), -1) / 255.0 - 0.4) / 0.3
    logits = x @ w.T + b
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    d = p.copy()
    d[rows, labels] -= 1
    right = (logits.argmax(1) == labels).mean()
    return -np.log(p[rows, labels]).mean(), right, [d.T @ x / len(x), d.mean(0)]


@pytest.mark.parametrize("scope, rho", [("model", RHO), ("layer", LAYER_RHO)])
@pytest.mark.parametrize("m", [SAMPLES, M])
def test_loss_and_top1_at_w_plus_eps_are_those_of_numpy(scope, rho, m):
    """Every group at its own w + eps, with its own third of the test images."""
    of = objective()
    w, b = (p.numpy() for p in of.saved)
    splits = [(s.images.numpy().astype(float), s.labels.numpy()) for s in (of.train, of.test)]
    (images, labels), (test_images, test_labels) = splits
    train, test, right = [], [], []
    for c in range(SAMPLES // m):
        own = slice(c * m, (c + 1) * m)
        held = slice(c * 10 * m // SAMPLES, (c + 1) * 10 * m // SAMPLES)
        g = softmax_loss(w, b, images[own], labels[own])[2]
        if scope == "model":
            eps = reference.ascend_model(g, [rho, rho], 2.0)
        else:
            eps = reference.ascend_layer([w, b], g, [rho, rho], "scaled")
        at = w + eps[0], b + eps[1]
        train.append(softmax_loss(*at, images[own], labels[own])[:2])
        some = softmax_loss(*at, test_images[held], test_labels[held])
        test.append(some[0] * len(test_labels[held]) / 10)
        right.append(some[1] * len(test_labels[held]) / 10)
    rows = measured(of, iterations=3, eigenvalues=1)["ascent"]
    at = (scope, "gradient", m)
    row = next(r for r in rows if (r["scope"], r["direction"], r["m"]) == at)
    assert row["rho"] == rho
    assert (row["train"]["loss"], row["train"]["top1"]) == pytest.approx(np.mean(train, 0))
    assert (row["test"]["loss"], row["test"]["top1"]) == pytest.approx((sum(test), sum(right)))


def test_the_loss_rises_most_along_the_gradient_and_groups_rise_more_than_all():
    rows = measured(tiny(), iterations=3, eigenvalues=1)["ascent"]
    for scope in ("model", "layer"):
        loss = {(r["direction"], r["m"]): r["train"]["loss"] for r in rows if r["scope"] == scope}
        assert loss["gradient", M] > loss["gradient", SAMPLES] > loss["random", None]


def test_a_random_direction_has_the_norm_of_eps():
    of = tiny()
    norms = torch.tensor([3.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    got = scaled_to([torch.randn_like(w) for w in of.saved], norms)
    assert [float(d.norm()) for d in got] == pytest.approx(norms.tolist())


def test_dropout_is_off():
    of = objective(nn.Dropout(0.9), nn.Linear(PIXELS, CLASSES))
    w, b = of.saved
    x = (of.train.images.double().flatten(1) / 255 - 0.4) / 0.3
    loss = float(nn.functional.cross_entropy(x @ w.T + b, of.train.labels))
    assert of.score()["train"].loss == pytest.approx(loss, rel=1e-5)


def test_weights_are_restored_to_the_bit():
    of = tiny(torch.float32)
    before = [p.detach().clone() for p in of.weights]
    measured(of, iterations=3)
    assert all(torch.equal(p, b) for p, b in zip(of.weights, before, strict=True))


def test_every_filter_of_a_direction_has_the_norm_of_the_weights_filter():
    weights = [torch.randn(4, 3, 2), torch.randn(4), torch.zeros(2, 2)]
    direction = filter_normalised(weights, seed=1)
    torch.testing.assert_close(
        direction[0].flatten(1).norm(dim=1), weights[0].flatten(1).norm(dim=1)
    )
    assert not direction[1].any() and not direction[2].any()
    assert torch.equal(direction[0], filter_normalised(weights, seed=1)[0])


# Rounding.


def test_int4_rounding_is_what_a_hand_computes():
    """Row 1: scale 7/7 = 1. Row 2: scale 1.4/7 = 0.2. Halves go to the even integer."""
    weight = torch.tensor([[7.0, -2.4, 2.5, 0.4], [-1.4, 0.7, 0.29, 0.31], [0, 0, 0, 0]])
    by_hand = torch.tensor([[7.0, -2, 2, 0], [-1.4, 0.8, 0.2, 0.4], [0, 0, 0, 0]])
    weight[1, 1] = 0.72  # 3.6 scales
    torch.testing.assert_close(rounded(weight, bits=4), by_hand)


def test_int8_rounding_moves_no_weight_by_more_than_half_a_scale():
    weight = torch.randn(5, 40)
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded(weight, bits=8) - weight).abs() <= scale / 2 * 1.0001).all()
    assert len(rounded(weight, bits=4)[0].unique()) <= 15


def test_only_matrices_of_linear_layers_and_convolutions_are_rounded():
    from dist_looksam import models

    model = models.create("vit_8", num_classes=10, image_shape=(1, 8, 8))
    names = {id(p): name for name, p in model.named_parameters()}
    rounds = {names[id(p)] for p in matrices(model)}
    linear = ("qkv", "proj", "fc1", "fc2", "embed", "head")
    assert rounds == {n for n in names.values() if n.endswith(tuple(f"{x}.weight" for x in linear))}
    assert "pos_embed" not in rounds


def test_rounding_in_a_measurement_rounds_every_matrix_and_no_bias():
    of = objective()
    w, b = of.saved
    with torch.no_grad():
        logits = of.train.images.double().flatten(1).sub(0.4 * 255).div(0.3 * 255)
        out = logits @ rounded(w, bits=4).T + b
    loss = float(nn.functional.cross_entropy(out, of.train.labels))
    row = next(r for r in measured(of, iterations=3)["rounding"] if r["bits"] == 4)
    assert row["train"]["loss"] == pytest.approx(loss)
