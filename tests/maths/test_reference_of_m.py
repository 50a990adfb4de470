"""m in the truth: identities on a least-squares problem of 12 samples."""

import numpy as np
import pytest
import reference

MATRIX = np.random.default_rng(3).standard_normal((12, 4))
TARGETS = np.random.default_rng(4).standard_normal(12)


def part_of_squares(weights, t, low, high):
    """Of the mean over samples [low, high) of (a w - y - t)^2 / 2, for two layers in a row."""
    a, w = MATRIX[low:high], np.concatenate(weights)
    g = a.T @ (a @ w - TARGETS[low:high] - t) / (high - low)
    return [g[:3], g[3:]]


def squares(weights, t):
    left = MATRIX @ np.concatenate(weights) - TARGETS - t
    return float(left @ left) / 24, part_of_squares(weights, t, 0, 12)


def start():
    return list(np.split(np.random.default_rng(5).standard_normal(4), [3]))


def of_squares(optimizer, m, **how):
    how = {"steps": 7, "k": 3, "eps": 1e-4, "momentum": 0.0, "lr": 0.1, "rho": 0.5, **how}
    how = {"m": m, "batch_size": 12, "part_gradient": part_of_squares, **how}
    how["groups"] = [{"layers": [0, 1], "weight_decay": 0.1}]
    return reference.train(start(), squares, optimizer=optimizer, **how)


METHODS = ("sam", "look_sam", "layer_sam", "look_layer_sam")


@pytest.mark.parametrize("optimizer", METHODS)
def test_one_group_of_the_whole_batch_is_no_groups(optimizer):
    whole, one = of_squares(optimizer, None), of_squares(optimizer, 12)
    np.testing.assert_array_equal(np.stack(whole.weights[-1][0]), np.stack(one.weights[-1][0]))
    assert whole.records == one.records


@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 12])
def test_g_v_of_groups_is_that_of_a_single_formula(m):
    """g_s = g + mean of H_c rho g_c / ||g_c||, with H_c = A_c' A_c / m: the loss is quadratic."""
    got = of_squares("look_sam", m, base="sgd", steps=1, rho=0.3)
    w = np.concatenate(start())
    left = MATRIX @ w - TARGETS
    g, extra = MATRIX.T @ left / 12, np.zeros(4)
    for a, r in zip(np.split(MATRIX, 12 // m), np.split(left, 12 // m), strict=True):
        g_c = a.T @ r / m
        extra += (a.T @ a / m) @ (0.3 * g_c / np.linalg.norm(g_c)) / (12 // m)
    g_v = extra - (extra @ g) / (g @ g) * g
    np.testing.assert_allclose(np.concatenate(got.g_v), g_v, rtol=1e-10, atol=1e-14)
    step = 0.1 * (g + extra + 0.1 * w)
    np.testing.assert_allclose(np.concatenate(got.weights[0]), w - step, rtol=1e-12)


@pytest.mark.parametrize("optimizer", METHODS)
def test_m_changes_the_result_and_the_order_within_a_group_does_not(optimizer):
    ends = {m: np.concatenate(of_squares(optimizer, m).weights[-1]) for m in (1, 3, 12)}
    assert np.abs(ends[1] - ends[12]).max() > 1e-4 < np.abs(ends[3] - ends[12]).max()
    order = np.concatenate([3 * c + np.array([2, 0, 1]) for c in range(4)])

    def shuffled(weights, t, low, high):
        a, w = MATRIX[order][low:high], np.concatenate(weights)
        g = a.T @ (a @ w - TARGETS[order][low:high] - t) / (high - low)
        return [g[:3], g[3:]]

    got = np.concatenate(of_squares(optimizer, 3, part_gradient=shuffled).weights[-1])
    np.testing.assert_allclose(got, ends[3], atol=1e-12)


def test_one_bad_group_skips_the_whole_step():
    """In its first pass or in its second; the next step looks again."""

    for bad_call in (5, 6):  # of the third of four groups, at step 3
        calls = {"look": 0}

        def spoilt(weights, t, low, high, calls=calls, bad_call=bad_call):
            calls["look"] += t == 3
            bad = t == 3 and calls["look"] == bad_call
            return [x * np.nan if bad else x for x in part_of_squares(weights, t, low, high)]

        run = of_squares("look_sam", 3, part_gradient=spoilt)
        assert [r["skipped"] for r in run.records] == [t == 3 for t in range(7)]
        assert [r["look"] for r in run.records] == [True, False, False, True, True, False, True]
        np.testing.assert_array_equal(run.weights[3][0], run.weights[2][0])
