"""Means, spread, ratios, falls, and the words and tables made of them."""

import re

import made_up
import numpy as np
import pytest

from dist_looksam.report import runs, scaling, study, tables
from dist_looksam.report.answer import answer
from dist_looksam.report.kept import kept
from dist_looksam.report.panels import apart


def made(folder, accuracies: dict, **how):
    """A study of {method: {batch: top1 of each seed}}; `how`: seconds, passes ... by method."""
    for method, batches in accuracies.items():
        for batch, values in batches.items():
            for seed, top1 in enumerate(values):
                rest = {name: value[method] for name, value in how.items() if method in value}
                path = folder / f"{method}-{batch}-{seed}"
                made_up.run(path, method, batch=batch, seed=seed, top1=top1, **rest)
    return study.study(runs.find([str(folder)]))


def test_mean_and_spread_are_those_of_the_seeds(tmp_path):
    draws = np.random.default_rng(0).uniform(0.5, 0.9, 5)
    seen = made(tmp_path, {"adamw": {192: draws}})
    top1 = seen.cells["adamw", 192].top1
    assert top1.mean == pytest.approx(np.mean(draws), abs=1e-12)
    assert top1.sd == pytest.approx(np.std(draws, ddof=1), abs=1e-12)
    assert top1.n == 5


def test_the_spread_of_a_ratio_and_of_a_difference_is_that_of_single_runs():
    """Against a hundred thousand draws; to first order only, so small spreads."""
    draw = np.random.default_rng(1)
    a, b = draw.normal(2.0, 0.04, 100_000), draw.normal(1.0, 0.03, 100_000)
    x, y = study.Amount.of(a), study.Amount.of(b)
    assert x.over(y).sd == pytest.approx(np.std(a / b), rel=0.02)
    assert x.minus(y).sd == pytest.approx(np.std(a - b), rel=0.02)
    single = study.Amount.of([1.0])
    assert x.over(single).sd is None and x.minus(single).sd is None


def test_times_are_compared_on_equal_ranks_only(tmp_path):
    """A method on two ranks once looked twice as fast as its base on one."""
    for method, seconds in (("adamw", 10.0), ("sam", 20.0)):
        made_up.run(tmp_path / method, method, seconds=seconds, ranks=1)
    made_up.run(tmp_path / "fast", "look_sam", seconds=6.0, ranks=2)
    seen = study.study(runs.find([str(tmp_path)]))
    line = {label.name: label for label in seen.labels}
    assert seen.cost(line["sam"], 192, "seconds").mean == pytest.approx(2.0)
    assert seen.cost(line["look_sam"], 192, "seconds") is None
    made_up.run(tmp_path / "more", "adamw", seed=1, seconds=4.0, ranks=2)
    seen = study.study(runs.find([str(tmp_path)]))
    assert seen.cost(line["sam"], 192, "seconds").mean == pytest.approx(2.0)
    assert seen.cost(line["look_sam"], 192, "seconds").mean == pytest.approx(1.5)


def test_costs_are_by_step_and_against_the_own_base(tmp_path):
    made_up.run(tmp_path / "adamw", "adamw", seconds=10, steps=10)
    made_up.run(tmp_path / "lamb", "lamb", seconds=20, steps=10)
    made_up.run(tmp_path / "layer", "look_layer_sam", seconds=24, steps=5, passes=1.2)
    seen = study.study(runs.find([str(tmp_path)]))
    line = {label.name: label for label in seen.labels}
    assert line["look_layer_sam"].base_label == "lamb"
    assert seen.cost(line["look_layer_sam"], 192, "seconds").mean == pytest.approx(2.4)
    assert seen.cost(line["look_layer_sam"], 192, "passes").mean == pytest.approx(1.2)


FALLING = {
    "adamw": {
        192: (0.9, 0.902, 0.901),
        384: (0.893, 0.895, 0.894),
        768: (0.889, 0.891, 0.89),
        1536: (0.68, 0.92, 0.8),
    }
}


def test_a_method_holds_until_its_mean_is_too_far_below_its_best(tmp_path):
    seen = made(tmp_path, FALLING)
    hold = seen.hold("adamw", 1.0)
    assert (hold.best_at, hold.up_to, hold.falls_at) == (192, 384, 768)
    assert hold.fall.mean == pytest.approx(0.011) and hold.fall.clear
    wide = seen.hold("adamw", 5.0)
    assert (wide.up_to, wide.falls_at) == (768, 1536)
    assert not wide.fall.clear  # ten points, but the seeds are twenty-four apart
    assert seen.hold("adamw", 50.0).falls_at is None


def test_a_method_that_is_worse_at_small_batches_does_not_fall_there(tmp_path):
    seen = made(tmp_path, {"lamb": {192: (0.8,), 384: (0.9,), 768: (0.895,)}})
    hold = seen.hold("lamb", 1.0)
    assert (hold.best_at, hold.up_to, hold.falls_at) == (384, 768, None)


def bold(table: tables.Table) -> list[str]:
    return [cell.text for row in table.rows for cell in row if cell.bold]


def test_the_best_is_bold_only_where_it_leads_by_more_than_the_spread(tmp_path):
    seen = made(
        tmp_path,
        {
            "adamw": {192: (0.90, 0.902, 0.901), 384: (0.90, 0.91, 0.905), 768: (0.90,)},
            "sam": {192: (0.91, 0.912, 0.911), 384: (0.904, 0.914, 0.909), 768: (0.99,)},
        },
    )
    assert bold(tables.accuracy(seen)) == ["91.10 ± 0.10"]  # not 384: within; not 768: unknown


def test_two_seeds_and_seeds_that_are_equal_make_nothing_clear(tmp_path):
    """Two equal seeds had a spread of 0, and any lead over them was 'more than the spread'."""
    seen = made(
        tmp_path,
        {
            "adamw": {192: (0.90, 0.90), 384: (0.90, 0.902), 768: (0.9, 0.9, 0.9)},
            "sam": {192: (0.901, 0.901), 384: (0.95, 0.952), 768: (0.91, 0.91, 0.91)},
        },
    )
    assert not bold(tables.accuracy(seen))
    assert "9.9 ± " not in words(seen, 1.0) and "more than the spread" not in words(seen, 1.0)
    assert "(spread unknown)" in words(seen, 1.0)


def test_markdown_has_every_mean_and_its_n(tmp_path):
    top1 = {"adamw": {192: (0.9, 0.91, 0.905), 384: (0.8,)}, "sam": {192: (0.93, 0.94, 0.935)}}
    seen = made(tmp_path, top1)
    text = tables.accuracy(seen).markdown()
    lines = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    assert lines[0] == ["batch", "192", "384"]
    assert lines[2] == ["adamw", "90.50 ± 0.50", "80.00 (n=1)"]
    assert lines[3] == ["sam", "**93.50 ± 0.50**", "-"]
    assert len({len(line) for line in lines}) == 1


def test_seconds_are_shown_with_their_spread_and_their_ranks(tmp_path):
    for seed, taken in ((0, 10.0), (1, 12.0)):
        made_up.run(tmp_path / f"a{seed}", seed=seed, seconds=taken)
        made_up.run(tmp_path / f"b{seed}", "sam", seed=seed, seconds=taken, ranks=4)
    rows = tables.seconds(study.study(runs.find([str(tmp_path)]))).rows
    told = [[cell.text for cell in row] for row in rows]
    assert told == [["adamw", "11.0 ± 1.4"], ["sam", "11.0 ± 1.4 on 4 ranks"]]


def both(look: float, sam: float, adamw: float, spread: float = 0.002):
    """Three methods at two batches, three seeds each `spread` apart."""
    rows = {"look_sam": look, "sam": sam, "adamw": adamw}
    return {m: {b: (x - spread, x, x + spread) for b in (192, 384)} for m, x in rows.items()}


COSTS = {
    "seconds": {"look_sam": 12.0, "sam": 20.0, "adamw": 10.0},
    "passes": {"look_sam": 1.2, "sam": 2.0, "adamw": 1.0},
    "steps": {"look_sam": 10, "sam": 10, "adamw": 10},
}


def words(seen: study.Study, points: float) -> str:
    return answer(seen, points).replace("\N{MINUS SIGN}", "-")


def test_the_answer_says_what_k_costs_and_keeps(tmp_path):
    text = words(made(tmp_path, both(0.915, 0.92, 0.90), **COSTS), 1.0)
    assert "look_sam with k=5 takes 1.20 passes a step against 2.00 of sam and 1.00 of" in text
    assert "and 1.20 times the seconds of adamw" in text
    assert "Against sam its mean differs by -0.5 points: by more than the spread at" in text
    assert "over batches 192 and 384 sam gains 2.0 ± 0.2 points over adamw, more than the" in text
    assert "look_sam keeps 75 % of that (95 % interval " in text
    assert "All 3 methods keep within 1 point of their own best mean up to batch 384" in text


def test_the_answer_calls_small_differences_within_spread(tmp_path):
    text = words(made(tmp_path, both(0.901, 0.902, 0.90, spread=0.01), **COSTS), 1.0)
    assert "differs by -0.1 points, within spread at every batch." in text
    assert "sam itself gains nothing over adamw beyond the spread" in text
    assert "0.1 ± 1.4 points above look_sam (within spread)" in text
    assert "more than" not in text


def test_the_answer_claims_no_spread_from_one_seed(tmp_path):
    one = {m: {b: v[:1] for b, v in batches.items()} for m, batches in both(0.9, 0.95, 0.8).items()}
    text = words(made(tmp_path, one, **COSTS), 1.0)
    assert "spread unknown" in text and "Every point is a single seed" in text
    assert "within spread" not in text and "more than the spread" not in text
    assert "keeps" not in text


def test_the_answer_names_who_holds_furthest_and_where_others_fall(tmp_path):
    seen = made(tmp_path, FALLING | {"lamb": {192: (0.88, 0.88), 768: (0.879, 0.879)}})
    text = words(seen, 1.0)
    assert text.startswith(
        "lamb keeps within 1 point of its own best mean up to batch 768, further than adamw."
    )
    assert "The first fall below that: adamw at 768 (-1.1 ± 0.1 from 90.1 % at 192)." in text


def test_a_method_is_not_ahead_of_one_that_was_not_run_so_far(tmp_path):
    """sam, run at 192 and 384 alone, never fell, and lamb at 768 was 'further than any other'."""
    flat = {"lamb": {b: (0.88,) for b in (192, 384, 768)}, "sam": {b: (0.9,) for b in (192, 384)}}
    text = words(made(tmp_path / "a", FALLING | flat | {"look_sam": {192: (0.9,)}}), 1.0)
    assert text.startswith(
        "lamb keeps within 1 point of its own best mean up to batch 768, further than adamw; "
        "sam (to 384) and look_sam (to 192) were not run that far."
    )
    del flat["sam"]
    fallen = {"sam": {192: (0.9,), 384: (0.8,)}}  # not run at 768 either, but it has fallen
    text = words(made(tmp_path / "b", FALLING | flat | fallen), 1.0)
    assert "up to batch 768, further than any other." in text


def test_a_batch_without_a_run_that_counts_is_named_and_a_lost_one_is_a_fall(tmp_path):
    """Both were stepped over, and the method held 'up to 768'."""
    nan, flat = float("nan"), {b: (0.9,) for b in (192, 384, 768)}
    seen = made(tmp_path / "a", {"adamw": flat, "sam": {192: (0.9,), 768: (0.9,)}})
    hold = seen.hold("sam", 1.0)
    assert (hold.up_to, hold.missing, hold.falls_at) == (768, (384,), None)
    assert "On the way no run has finished of sam at 384." in words(seen, 1.0)
    assert "768 (no run at 384)" in tables.cost(seen, 1.0).markdown()
    seen = made(tmp_path / "b", {"adamw": flat, "sam": flat | {384: (nan,), 1536: (nan,)}})
    hold = seen.hold("sam", 1.0)
    assert (hold.up_to, hold.falls_at, hold.fall) == (192, 384, None)
    text = words(seen, 1.0)
    assert "sam at 384 (no run there has an accuracy)" in text
    assert "the largest batch tried" not in text  # which is 1,536
    assert "192, no accuracy at 384" in tables.cost(seen, 1.0).markdown()


def test_what_is_kept_is_a_ratio_of_sums_over_all_batches(tmp_path):
    """Batches where SAM gained less than the spread were left out, so chance chose the figure."""
    three = np.array([-0.001, 0.0, 0.001])
    top1 = {
        "adamw": {192: 0.90 + three, 384: 0.90 + three, 768: 0.90 + three},
        "sam": {192: 0.93 + three, 384: 0.9005 + three},  # a gain of 3 and one within spread
        "look_sam": {192: 0.92 + three, 384: 0.89 + three, 768: 0.85 + three},
    }
    seen = made(tmp_path, top1)
    (label,) = (x for x in seen.labels if x.name == "look_sam")
    found = kept(seen, label)
    assert found.batches == (192, 384)
    assert found.share == pytest.approx((0.02 - 0.01) / (0.03 + 0.0005))
    assert found.gain.mean == pytest.approx(0.0305 / 2)
    assert found.gain.sd == pytest.approx(np.sqrt(4) * 0.001 / 2)
    assert found == kept(seen, label)


def test_the_interval_of_what_is_kept_is_as_wide_as_other_seeds_would_make_it(tmp_path):
    """Against the share of two thousand other sets of twelve seeds; a bootstrap's is sqrt(11/12)
    of that, and one set's spread is known to a fifth. A share of 2, so that the seeds of all three
    methods matter: those of the first alone would make it 2.4 times narrower."""
    draw = np.random.default_rng(3)

    def seeds(mean: float) -> np.ndarray:
        return draw.normal(mean, 0.004, 12)

    means = {"adamw": 0.90, "sam": 0.92, "look_sam": 0.94}
    seen = made(tmp_path, {m: {b: seeds(x) for b in (192, 384)} for m, x in means.items()})
    found = kept(seen, seen.labels[[x.name for x in seen.labels].index("look_sam")])
    others = []
    for _ in range(2000):
        a, s, k = (seeds(x).mean() + seeds(x).mean() for x in means.values())
        others.append((k - a) / (s - a))
    low, high = np.percentile(others, (2.5, 97.5))
    assert found.high - found.low == pytest.approx((high - low) * np.sqrt(11 / 12), rel=0.3)
    assert found.low < found.share < found.high


def test_nothing_is_kept_of_a_gain_that_two_seeds_show(tmp_path):
    two = {m: {b: v[:2] for b, v in rows.items()} for m, rows in both(0.915, 0.92, 0.9).items()}
    text = words(made(tmp_path, two), 1.0)
    assert "What look_sam has of sam's gain over adamw is not told: it takes 3 seeds" in text
    assert "% of that" not in text and "more than the spread" not in text


def test_the_answer_to_one_batch_claims_nothing_of_larger_ones(tmp_path):
    text = words(made(tmp_path, {"adamw": {192: (0.9, 0.91)}}), 1.0)
    assert text == ("No method was run at more than one batch, so nothing is known of larger ones.")


def test_speed_up_has_a_line_for_a_fixed_batch_and_one_for_a_fixed_share(tmp_path):
    for ranks, batch, seconds in ((1, 64, 8.0), (2, 64, 5.0), (2, 128, 9.0), (4, 128, 6.0)):
        made_up.run(tmp_path / f"{ranks}-{batch}", batch=batch, ranks=ranks, seconds=seconds)
    lines = scaling.series(study.study(runs.find([str(tmp_path)])).finals)
    assert set(lines) == {"adamw, batch 64", "adamw, batch 128", "adamw, 64 a rank",
                          "adamw, 32 a rank"}  # fmt: skip
    rate = dict(lines["adamw, 64 a rank"])
    assert rate[2].mean / rate[1].mean == pytest.approx(2 * 8 / 9)
    text = tables.ranks({"adamw, batch 64": lines["adamw, batch 64"]}).markdown()
    assert re.search(r"\| adamw, batch 64 \| +2 \| +154 \| +1.60 \| +80 % \|", text)


def test_names_at_the_ends_of_lines_do_not_touch_and_stay_near():
    places = apart([10.0, 11.0, 12.0, 100.0], gap=10, end=300)
    assert places == [1.0, 11.0, 21.0, 100.0]
    assert apart([95.0, 99.0], gap=10, end=100) == [90.0, 100.0]
    assert apart([], gap=10, end=100) == []


def test_eight_methods_differ_in_colour_and_in_marker(tmp_path):
    names = ["sgd", "adamw", "lamb", "sam", "sam_k", "look_sam", "layer_sam", "look_layer_sam"]
    seen = made(tmp_path, {name: {192: (0.9,)} for name in names})
    drawn = scaling.accuracy(seen, width=300, height=200).looks
    assert len({look.colour for look in drawn.values()}) == 8
    assert len({look.shape for look in drawn.values()}) == 8


def test_accuracy_that_collapses_is_drawn_by_its_error_so_that_small_differences_show(tmp_path):
    near = made(tmp_path / "near", {"adamw": {192: (0.9,), 384: (0.8,)}})
    assert "type" not in scaling.accuracy(near, width=300, height=200).y_scale
    far = scaling.accuracy(
        made(tmp_path / "far", {"adamw": {192: (0.9,), 384: (0.3,)}}), width=300, height=200
    )
    assert far.y_scale["type"] == "log" and far.y_scale["reverse"]
    assert [p.y for p in far.points] == pytest.approx([0.1, 0.7])
    low, high = far.y_scale["domain"]
    assert low < 0.1 and 0.7 < high <= 1
    perfect = made(tmp_path / "perfect", {"adamw": {192: (1.0,), 384: (0.3,)}})
    assert "type" not in scaling.accuracy(perfect, width=300, height=200).y_scale
