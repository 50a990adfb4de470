"""The truth is checked too: by hand, against torch.optim, and by what must hold for any numbers."""

import numpy as np
import pytest
import reference
import torch
from reference import train

ALL = [{"layers": [0], "weight_decay": 0.0}]


def quadratic(*curvatures):
    """loss = sum of c w^2 / 2 over layers, so g = c w can be done in the head."""

    def gradient(weights, t):
        g = [np.asarray(c) * w for c, w in zip(curvatures, weights, strict=True)]
        return sum(float((x * w).sum()) for x, w in zip(g, weights, strict=True)) / 2, g

    return gradient


def once(weights, gradient, **how):
    settings = {"base": "sgd", "momentum": 0.0, "lr": 0.1, "groups": ALL, "rho": 0.5, "steps": 1}
    return train(weights, gradient, **settings | how)


def random_layers(seed, shapes=((7, 3), (5,), (1,))):
    numbers = np.random.default_rng(seed)
    return [numbers.standard_normal(s) for s in shapes]


# --- by hand -------------------------------------------------------------------------------------


def test_sam_on_a_bowl_done_by_hand():
    """g = (3, 4), eps = .5 g/5 = (.3, .4), g_s = (3.9, 5.6), w = (1, 1) - .1 g_s."""
    run = once([np.ones(2)], quadratic([3.0, 4.0]), optimizer="sam")
    np.testing.assert_allclose(run.weights[0][0], [0.61, 0.44], rtol=1e-14)
    assert run.records[0]["loss"] == 3.5 and run.records[0]["look"]
    assert run.records[0]["grad_norm"] == 5.0
    assert run.records[0]["update_norm"] == pytest.approx(np.hypot(3.9, 5.6), rel=1e-14)


def test_look_sam_on_a_bowl_done_by_hand():
    """g_s.g/||g||^2 = 34.1/25, so g_v = (-.192, .144) and ||g_v|| = .24. Then one reuse step."""
    run = once([np.ones(2)], quadratic([3.0, 4.0]), optimizer="look_sam", alpha=0.7, k=2, steps=2)
    np.testing.assert_allclose(run.g_v[0], [-0.192, 0.144], rtol=1e-12)
    assert run.records[0]["gv_norm"] == pytest.approx(0.24, rel=1e-12)
    g = np.array([3 * 0.61, 4 * 0.44])
    d = g + 0.7 * np.hypot(*g) / 0.24 * np.array([-0.192, 0.144])
    np.testing.assert_allclose(run.weights[1][0], [0.61, 0.44] - 0.1 * d, rtol=1e-12)


def test_natural_reuse_adds_what_the_look_added():
    how = {"optimizer": "look_sam", "alpha": 1.0, "k": 2, "steps": 2, "reuse": "natural"}
    run = once([np.ones(2)], quadratic([3.0, 4.0]), **how)
    d = np.array([3 * 0.61 - 0.192, 4 * 0.44 + 0.144])
    np.testing.assert_allclose(run.weights[1][0], [0.61, 0.44] - 0.1 * d, rtol=1e-12)


@pytest.mark.parametrize(("form", "eps"), [("scaled", [1.5, -2.0]), ("literal", [0.5, -0.5])])
def test_layer_ascent_done_by_hand(form, eps):
    """||w|| = 5, g = (3, -4): scaled is .5*5*(.6, -.8), the printed form .5*(5/5)*(1, -1)."""
    got = reference.ascend_layer([np.array([0.0, 5.0])], [np.array([3.0, -4.0])], [0.5], form)
    np.testing.assert_allclose(got[0], eps, rtol=1e-14)


def test_lamb_first_step_done_by_hand():
    """The first Adam direction is sign(g): u = (1, 1) + .1 (3, 4), ratio 5/||u||."""
    decayed = [{"layers": [0], "weight_decay": 0.1}]
    how = {"base": None, "optimizer": "lamb", "groups": decayed, "eps": 0.0}
    run = once([np.array([3.0, 4.0])], quadratic([1.0, 2.0]), **how)
    want = [3.0, 4.0] - 0.1 * 5 / np.hypot(1.3, 1.4) * np.array([1.3, 1.4])
    np.testing.assert_allclose(run.weights[0][0], want, rtol=1e-14)


def test_lars_first_step_done_by_hand():
    """u = g + .1 w = (3.3, 8.4), ratio 5/||u||."""
    decayed = [{"layers": [0], "weight_decay": 0.1}]
    how = {"base": None, "optimizer": "lars", "groups": decayed}
    run = once([np.array([3.0, 4.0])], quadratic([1.0, 2.0]), **how)
    want = [3.0, 4.0] - 0.1 * 5 / np.hypot(3.3, 8.4) * np.array([3.3, 8.4])
    np.testing.assert_allclose(run.weights[0][0], want, rtol=1e-14)


@pytest.mark.parametrize("base", ["lamb", "lars"])
def test_layers_without_weight_decay_take_the_plain_step(base):
    how = {"base": None, "optimizer": base, "eps": 0.0}
    run = once([np.array([3.0, 4.0])], quadratic([1.0, 2.0]), **how)
    u = {"lamb": [1.0, 1.0], "lars": [3.0, 8.0]}[base]
    np.testing.assert_allclose(run.weights[0][0], [3.0, 4.0] - 0.1 * np.array(u), rtol=1e-14)


def test_a_layer_that_starts_at_zero_still_learns():
    def gradient(weights, t):
        return 0.0, [np.array([3.0, -4.0])]

    decayed = [{"layers": [0], "weight_decay": 0.1}]
    how = {"base": None, "optimizer": "layer_sam", "groups": decayed, "eps": 0.0}
    run = once([np.zeros(2)], gradient, **how)
    np.testing.assert_allclose(run.weights[0][0], [-0.1, 0.1], rtol=1e-14)


def test_clipping_is_applied_once_to_what_the_base_gets():
    """g_s = (3.9, 5.6) is shortened to length 2; eps came from the whole g."""
    run = once([np.ones(2)], quadratic([3.0, 4.0]), optimizer="sam", clip=2.0)
    want = 1 - 0.1 * 2 / np.hypot(3.9, 5.6) * np.array([3.9, 5.6])
    np.testing.assert_allclose(run.weights[0][0], want, rtol=1e-14)
    assert run.records[0]["grad_norm"] == 5.0
    assert run.records[0]["update_norm"] == pytest.approx(2.0, rel=1e-14)


def test_a_gradient_shorter_than_the_clip_is_left_alone():
    free, clipped = (
        once([np.ones(2)], quadratic([3.0, 4.0]), optimizer="sam", clip=c) for c in (None, 100.0)
    )
    np.testing.assert_array_equal(free.weights[0][0], clipped.weights[0][0])


def test_groups_have_their_own_numbers():
    """Layer 1 has its own lr, decay, rho; ||g|| = 5 is over both layers, alpha is per layer."""
    groups = [
        {"layers": [0], "weight_decay": 0.0},
        {"layers": [1], "weight_decay": 0.5, "lr": 0.2, "rho": 1.0, "alpha": 0.0},
    ]
    run = once(
        [np.ones(1), np.ones(1)],
        quadratic(3.0, 4.0),
        optimizer="look_sam",
        groups=groups,
        k=2,
        steps=2,
    )
    g_s = [3 * (1 + 0.5 * 3 / 5), 4 * (1 + 1.0 * 4 / 5)]
    w = [1 - 0.1 * g_s[0], 1 - 0.2 * (g_s[1] + 0.5)]
    np.testing.assert_allclose(np.concatenate(run.weights[0]), w, rtol=1e-14)
    g = np.array([3 * w[0], 4 * w[1]])
    v = np.concatenate(run.g_v)
    first = w[0] - 0.1 * (g[0] + 0.7 * np.linalg.norm(g) / np.linalg.norm(v) * v[0])
    second = w[1] - 0.2 * (g[1] + 0.5 * w[1])
    np.testing.assert_allclose(np.concatenate(run.weights[1]), [first, second], rtol=1e-12)


def test_every_group_perturbs_along_its_own_gradient():
    """Two groups with g = (6, 0) and (0, 8): each looks along its own axis, eps (.5, 0), (0, .5).

    The loss of group c is c_c w_c^2 / 2, doubled so that the mean has curvatures 3 and 4. Climbing
    the mean instead, as with m the whole batch, would give eps = (.3, .4).
    """

    def part_gradient(weights, t, low, high):
        w = weights[0]
        assert (low, high) in ((0, 5), (5, 10))
        return [np.array([6 * w[0], 0.0] if low == 0 else [0.0, 8 * w[1]])]

    how = {"optimizer": "sam", "m": 5, "batch_size": 10, "part_gradient": part_gradient}
    run = once([np.ones(2)], quadratic([3.0, 4.0]), **how)
    np.testing.assert_allclose(run.weights[0][0], [1 - 0.1 * 4.5, 1 - 0.1 * 6.0], rtol=1e-14)


# --- against torch.optim -------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_the_bases_are_those_of_torch(base):
    start, pull = random_layers(0), random_layers(1)

    def gradient(weights, t):
        return 0.0, [np.sin(w + t) + x for w, x in zip(weights, pull, strict=True)]

    groups = [{"layers": [0, 2], "weight_decay": 0.1}, {"layers": [1], "weight_decay": 0.0}]
    run = train(start, gradient, optimizer=base, steps=20, lr=0.05, groups=groups, rho=0.0)

    params = [torch.tensor(x, requires_grad=True) for x in start]
    torch_groups = [
        {"params": [params[i] for i in each["layers"]], "weight_decay": each["weight_decay"]}
        for each in groups
    ]
    if base == "sgd":
        optimizer = torch.optim.SGD(torch_groups, lr=0.05, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(torch_groups, lr=0.05)
    for t in range(20):
        _, grads = gradient([x.detach().numpy() for x in params], t)
        for x, g in zip(params, grads, strict=True):
            x.grad = torch.tensor(g)
        optimizer.step()
        for x, want in zip(params, run.weights[t], strict=True):
            np.testing.assert_allclose(x.detach().numpy(), want, rtol=0, atol=1e-12)


# --- for any numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0, np.inf])
def test_eps_has_length_rho_and_nothing_of_that_length_ascends_further(p):
    """The p-ball of radius rho: ||eps||_p = rho, and eps.g = rho ||g||_q, Hoelder's bound."""
    g = random_layers(0)
    eps = np.concatenate([x.ravel() for x in reference.ascend_model(g, [0.3] * 3, p)])
    flat = np.concatenate([x.ravel() for x in g])
    q = 1.0 if p == np.inf else p / (p - 1)
    np.testing.assert_allclose(np.linalg.norm(eps, p), 0.3, rtol=1e-12)
    np.testing.assert_allclose(eps @ flat, 0.3 * np.linalg.norm(flat, q), rtol=1e-12)


def test_the_p_norm_forms_have_the_known_special_cases():
    g = random_layers(0)
    for got, x in zip(reference.ascend_model(g, [0.3] * 3, 2.0), g, strict=True):
        np.testing.assert_allclose(got, 0.3 * x / reference.norm(g), rtol=1e-12)
    for got, x in zip(reference.ascend_model(g, [0.3] * 3, np.inf), g, strict=True):
        np.testing.assert_allclose(got, 0.3 * np.sign(x), rtol=1e-12)


@pytest.mark.parametrize("decompose", ["model", "layer"])
def test_g_v_is_orthogonal_to_g_and_the_rest_is_along_g(decompose):
    g_s, g = random_layers(0), random_layers(1)
    g_v = reference.new_part(g_s, g, decompose)
    parts = (
        [(g_s, g, g_v)]
        if decompose == "model"
        else [([a], [b], [c]) for a, b, c in zip(g_s, g, g_v, strict=True)]
    )
    for s, x, v in parts:
        assert abs(reference.dot(v, x)) < 1e-12
        along = [a - b for a, b in zip(s, v, strict=True)]
        assert abs(reference.dot(along, x)) == pytest.approx(
            reference.norm(along) * reference.norm(x), rel=1e-12
        )


def test_paper_reuse_adds_alpha_times_the_length_of_g():
    g, g_v = random_layers(0), random_layers(1)
    got = reference.reuse_part(g, g_v, [0.7] * 3, "model", "paper")
    added = reference.norm([a - b for a, b in zip(got, g, strict=True)])
    assert added == pytest.approx(0.7 * reference.norm(g), rel=1e-12)


@pytest.mark.parametrize("decompose", ["model", "layer"])
@pytest.mark.parametrize("reuse", ["paper", "natural"])
def test_nothing_learned_adds_nothing(decompose, reuse):
    g = random_layers(0)
    zero = [np.zeros_like(x) for x in g]
    np.testing.assert_equal(reference.reuse_part(g, zero, [0.7] * 3, decompose, reuse), g)


@pytest.mark.parametrize("optimizer", list(reference.TABLE))
def test_a_zero_gradient_leaves_finite_weights(optimizer):
    decayed = [{"layers": [0], "weight_decay": 0.1}]
    how = {"base": None, "optimizer": optimizer, "groups": decayed, "k": 2, "steps": 4, "eps": 1e-8}
    run = once([np.ones(2)], quadratic([0.0, 0.0]), **how)
    assert reference.finite(run.weights[-1])
    assert not any(r["skipped"] for r in run.records)


@pytest.mark.parametrize(
    ("optimizer", "looks"),
    [
        ("sgd", "......."),
        ("sam", "LLLLLLL"),
        ("layer_sam", "LLLLLLL"),
        ("sam_k", "L..L..L"),
        ("look_sam", "L..L..L"),
        ("look_layer_sam", "L..L..L"),
    ],
)
def test_looks_come_every_k_steps(optimizer, looks):
    run = once([np.ones(2)], quadratic([3.0, 4.0]), optimizer=optimizer, k=3, steps=7)
    assert "".join(".L"[r["look"]] for r in run.records) == looks


@pytest.mark.parametrize(
    ("bad", "looks", "skips"),
    [
        ([(0, 1)], "LL.L", "S..."),  # the first pass of a look: look again at once
        ([(0, 2)], "LL.L", "S..."),  # the second pass of a look
        ([(0, 2), (1, 1)], "LLLL", "SS.."),  # again, and again
        ([(1, 1)], "L..L", ".S.."),  # a reuse step: time goes on, no look must be repeated
        ([(3, 2)], "L..LL", "...S."),  # a later look: the old g_v is still there, but look anyway
    ],
)
@pytest.mark.parametrize("optimizer", ["look_sam", "sam_k"])
@pytest.mark.parametrize("base", ["sgd", "adamw", "lamb", "lars"])
def test_a_skipped_step_changes_nothing_but_the_time(base, optimizer, bad, looks, skips):
    calls = []
    bowl = quadratic([3.0, 4.0])

    def gradient(weights, t):
        calls.append(t)
        loss, g = bowl(weights, t)
        return loss, [np.array([np.nan, 1.0])] if (t, calls.count(t)) in bad else g

    how = {"optimizer": optimizer, "k": 3, "base": base, "momentum": 0.9, "steps": len(looks)}
    run = once([np.ones(2)], gradient, **how)
    assert "".join(".L"[r["look"]] for r in run.records) == looks
    assert "".join(".S"[r["skipped"]] for r in run.records) == skips
    before = [np.ones(2)]
    for now, record in zip(run.weights, run.records, strict=True):
        assert np.array_equal(now[0], before[0]) == record["skipped"]
        before = now
    if base in ("adamw", "lamb"):
        assert run.base_state[0]["step"] == skips.count(".")
    if optimizer == "look_sam":
        gv_norms = [r["gv_norm"] for r in run.records]
        assert all(
            gv_norms[t] == (gv_norms[t - 1] if t else 0.0)
            for t, skip in enumerate(skips)
            if skip == "S"
        )


def test_a_learning_rate_may_follow_the_time():
    run = once(
        [np.ones(2)], quadratic([3.0, 4.0]), optimizer="sgd", steps=2, lr=lambda t: [0.0, 0.1][t]
    )
    np.testing.assert_array_equal(run.weights[0][0], [1.0, 1.0])
    np.testing.assert_allclose(run.weights[1][0], [0.7, 0.6], rtol=1e-14)


def test_the_starting_weights_are_not_written_to():
    start = [np.ones(2)]
    once(start, quadratic([3.0, 4.0]), optimizer="look_sam", steps=3)
    np.testing.assert_array_equal(start[0], [1.0, 1.0])
