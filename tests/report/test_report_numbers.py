"""Means, spread, differences, ratios, falls, and the tables made of them."""

import re
from dataclasses import replace

import made_up
import numpy as np
import pytest

from dist_looksam.optim.table import METHODS
from dist_looksam.report import panels, ranking, runs, scaling, study, tables
from dist_looksam.report.comparison import report
from dist_looksam.report.panels import apart
from dist_looksam.report.statistic import Difference


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


def test_the_interval_of_a_difference_holds_the_truth_95_times_in_100():
    """Of four thousand sets of three seeds each: 95 %, give or take 1.4 (four standard errors)."""
    draw = np.random.default_rng(1)
    found = [Difference.of(draw.normal(0.01, 0.004, 3)) for _ in range(4000)]
    share = np.mean([d.low < 0.01 < d.high for d in found])
    assert share == pytest.approx(0.95, abs=0.014)


def test_a_difference_is_taken_seed_by_seed_of_the_seeds_that_both_have(tmp_path):
    """Seeds far apart hide a difference that is nearly the same at each."""
    top1 = {"adamw": {192: (0.80, 0.90, 0.85)}, "sam": {192: (0.811, 0.909, 0.860, 0.1)}}
    seen = made(tmp_path, top1)
    found = seen.cells["sam", 192].minus(seen.cells["adamw", 192])
    assert (found.mean, found.n) == (pytest.approx(0.01), 3)
    assert found.high - found.mean == pytest.approx(4.3027 * 0.001 / np.sqrt(3), rel=1e-4)
    assert found.clear


def test_one_seed_equal_differences_and_no_shared_seed_give_no_interval(tmp_path):
    for values in ((0.01,), (0.01, 0.01), (0.0, 0.0, 0.0)):
        assert Difference.of(values).low is None and not Difference.of(values).clear
    for seed, method in enumerate(("adamw", "sam")):
        made_up.run(tmp_path / method, method, seed=seed, top1=0.9 + 0.01 * seed)
    seen = study.study(runs.find([str(tmp_path)]))
    (text,) = (row[1] for row in tables.differences(seen).rows)
    assert text == "+1.00"


def test_the_mean_over_batches_is_of_the_seeds_that_ran_at_all_of_them(tmp_path):
    top1 = {
        "adamw": {192: (0.90, 0.90, 0.90), 384: (0.80, 0.80)},
        "sam": {192: (0.91, 0.92, 0.99), 384: (0.81, 0.82), 768: (0.5,)},
    }
    found = made(tmp_path, top1).over_batches("sam", "adamw")
    assert (found.mean, found.n) == (pytest.approx(0.015), 2)


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
        768: (0.8895, 0.891, 0.8895),
        1536: (0.68, 0.92, 0.8),
    }
}


def test_a_method_holds_until_its_mean_is_too_far_below_its_best(tmp_path):
    seen = made(tmp_path, FALLING)
    hold = seen.batch_range("adamw", 1.0)
    assert (hold.best_at, hold.up_to, hold.falls_at) == (192, 384, 768)
    assert hold.fall.mean == pytest.approx(-0.011) and hold.fall.clear
    assert "384; -1.10 (-1.22 to -0.98) at 768" in tables.cost(seen, 1.0).markdown()
    wide = seen.batch_range("adamw", 5.0)
    assert (wide.up_to, wide.falls_at) == (768, 1536)
    assert not wide.fall.clear  # ten points, but the seeds are twenty-four apart
    assert seen.batch_range("adamw", 50.0).falls_at is None


def test_a_method_that_is_worse_at_small_batches_does_not_fall_there(tmp_path):
    seen = made(tmp_path, {"lamb": {192: (0.8,), 384: (0.9,), 768: (0.895,)}})
    hold = seen.batch_range("lamb", 1.0)
    assert (hold.best_at, hold.up_to, hold.falls_at) == (384, 768, None)


def bold(table: tables.Table) -> list[str]:
    return [cell for row in table.rows for cell in row if isinstance(cell, tables.Bold)]


def test_the_best_is_bold_only_where_it_leads_beyond_chance(tmp_path):
    seen = made(
        tmp_path,
        {
            "adamw": {192: (0.90, 0.902, 0.901), 384: (0.90, 0.91, 0.905), 768: (0.90,)},
            "sam": {192: (0.91, 0.912, 0.912), 384: (0.904, 0.924, 0.903), 768: (0.99,)},
        },
    )
    assert bold(tables.accuracy(seen)) == ["91.13 ± 0.12"]  # not 384: within; not 768: unknown


def test_a_mean_that_leads_by_a_seed_that_the_other_lacks_is_not_bold(tmp_path):
    """On the three seeds that both have it is clearly behind."""
    first, second = (0.81, 0.8105, 0.8095), (0.80, 0.801, 0.799, 0.90)
    seen = made(tmp_path, {"adamw": {192: first}, "sam": {192: second}})
    assert seen.best(192) == ["sam", "adamw"] and not bold(tables.accuracy(seen))


def test_two_seeds_and_seeds_that_are_equal_make_nothing_clear(tmp_path):
    """Two equal seeds had a spread of 0, and any lead over them was called clear."""
    seen = made(
        tmp_path,
        {
            "adamw": {192: (0.90, 0.90), 384: (0.90, 0.902), 768: (0.9, 0.9, 0.9)},
            "sam": {192: (0.901, 0.901), 384: (0.95, 0.952), 768: (0.91, 0.91, 0.91)},
        },
    )
    assert not bold(tables.accuracy(seen))
    assert not bold(tables.differences(seen))


def test_markdown_has_every_mean_and_its_n(tmp_path):
    top1 = {"adamw": {192: (0.9, 0.91, 0.905), 384: (0.8,)}, "sam": {192: (0.93, 0.942, 0.935)}}
    seen = made(tmp_path, top1)
    text = tables.accuracy(seen).markdown()
    lines = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    assert lines[0] == ["batch", "192", "384"]
    assert lines[2] == ["adamw", "90.50 ± 0.50", "80.00 (n=1)"]
    assert lines[3] == ["sam", "**93.57 ± 0.60**", "-"]
    assert len({len(line) for line in lines}) == 1


def test_seconds_are_shown_with_their_spread_and_their_ranks(tmp_path):
    for seed, taken in ((0, 10.0), (1, 12.0)):
        made_up.run(tmp_path / f"a{seed}", seed=seed, seconds=taken)
        made_up.run(tmp_path / f"b{seed}", "sam", seed=seed, seconds=taken, ranks=4)
    rows = tables.seconds(study.study(runs.find([str(tmp_path)]))).rows
    assert rows == [["adamw", "11.0 ± 1.4"], ["sam", "11.0 ± 1.4 on 4 ranks"]]


def differences(seen: study.Study) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in tables.differences(seen).rows}


def test_methods_are_compared_with_their_base_and_with_sam_and_bases_with_one_another(tmp_path):
    top1 = {
        "adamw": {192: (0.90, 0.901, 0.902), 384: (0.90, 0.90, 0.90)},
        "sam": {192: (0.92, 0.922, 0.921), 384: (0.92, 0.921, 0.92)},
        "look_sam": {192: (0.91, 0.913, 0.912)},
        "lamb": {192: (0.90, 0.90, 0.90)},
    }
    rows = differences(made(tmp_path, top1))
    assert set(rows) == {"sam - adamw", "look_sam - adamw", "look_sam - sam", "lamb - adamw"}
    first, second, mean = rows["sam - adamw"]
    assert first == "+2.00 (+1.75 to +2.25)" and isinstance(first, tables.Bold)
    assert second.startswith("+2.03 (") and mean.startswith("+2.02 (")
    assert rows["look_sam - sam"] == ["-0.93 (-1.08 to -0.79)", "-", "-0.93 (-1.08 to -0.79)"]
    assert not isinstance(rows["lamb - adamw"][0], tables.Bold)


def test_nothing_is_said_to_go_further_than_others_by_a_threshold_alone(tmp_path):
    """lamb, 0.99 below its best, 'kept further than any other', 1.02 below theirs, all by chance:
    the fall at which a method is cut off carries its interval, and no sentence ranks methods."""
    noise = np.array([-0.006, 0.0, 0.006])
    top1 = {
        "adamw": {192: 0.865 + noise, 384: 0.8548 - noise},
        "lamb": {192: 0.8605 + noise, 384: 0.8511 - noise},
    }
    seen = made(tmp_path, top1)
    text = tables.cost(seen, 1.0).markdown()
    assert "192; -1.02 (-4.00 to +1.96) at 384" in text
    assert [seen.batch_range(name, 1.0).up_to for name in top1] == [192, 384]
    assert "further than" not in text + " ".join(seen.notes)


SLOW = "not measured on a quiet machine: of two runs that differ in their seed alone one took 3.0"


@pytest.mark.parametrize(("slow", "quiet"), [(1.2, True), (3.0, False)])
def test_times_of_a_machine_that_was_not_quiet_are_left_out(tmp_path, slow, quiet):
    """Seconds and ratios of a shared machine (0.35 to 3.9 where passes say 1.2) were printed as
    findings, with bars that reached below 0."""
    for method in ("adamw", "sam"):
        for seed in range(3):
            seconds = 10.0 * (slow if seed == 1 else 1.0)
            path = tmp_path / f"{method}{seed}"
            made_up.run(path, method, seed=seed, seconds=seconds, gv_ratio=0.1)
    seen = study.study(runs.find([str(tmp_path)]))
    assert seen.quiet == quiet and (SLOW in "\n".join(seen.notes)) == (not quiet)
    assert ("time / base" in tables.cost(seen, 1.0).head) == quiet
    titles = [panel.title for panel in scaling.lesser(seen, width=200, height=200)]
    assert ("Seconds to train" in titles) == quiet and "‖g_v‖ / ‖g‖ at looks" in titles
    top = scaling.accuracy(seen, width=200, height=200)
    assert all(("seconds" in point.tip) == quiet for point in top.points)
    for panel in scaling.lesser(seen, width=200, height=200):
        assert all(0 < point.low <= point.y * 1.000001 for point in panel.points)


def test_times_are_left_out_where_more_passes_took_less_time(tmp_path):
    """Methods run one after another, the base beside other work: 1.2 passes took 0.76 of 1."""
    for method, passes, seconds in (("adamw", 1.0, 10.0), ("sam", 2.0, 7.0)):
        for seed in range(2):
            made_up.run(
                tmp_path / f"{method}{seed}", method, seed=seed, seconds=seconds, passes=passes
            )
    seen = study.study(runs.find([str(tmp_path)]))
    assert not seen.quiet and "sam took 0.70 of the time of its base" in "\n".join(seen.notes)


def test_methods_at_one_batch_are_rows_with_the_best_on_top(tmp_path):
    for method, top1 in (("adamw", 0.8), ("look_sam", 0.9), ("lamb", 0.7)):
        for seed in range(2):
            path = tmp_path / f"{method}{seed}"
            made_up.run(path, method, seed=seed, top1=top1 + seed / 100)
    drawn = ranking.chart(study.study(runs.find([str(tmp_path)])), width=300).to_dict()
    layer = next(layer for layer in drawn["layer"] if layer["mark"]["type"] == "rule")
    assert layer["encoding"]["y"]["sort"] == ["look_sam", "adamw", "lamb"]
    rows = drawn["datasets"][layer.get("data", drawn.get("data"))["name"]]
    assert rows[0]["top1"] == "90.50 ± 0.71 %" and (rows[0]["low"], rows[0]["high"]) == (0.9, 0.91)


def test_a_batch_without_a_run_that_counts_is_named_and_a_lost_one_is_a_fall(tmp_path):
    """Both were stepped over, and the method held 'up to 768'."""
    nan, flat = float("nan"), {b: (0.9,) for b in (192, 384, 768)}
    seen = made(tmp_path / "a", {"adamw": flat, "sam": {192: (0.9,), 768: (0.9,)}})
    hold = seen.batch_range("sam", 1.0)
    assert (hold.up_to, hold.missing, hold.falls_at) == (768, (384,), None)
    assert "768 (no run at 384)" in tables.cost(seen, 1.0).markdown()
    seen = made(tmp_path / "b", {"adamw": flat, "sam": flat | {384: (nan,), 1536: (nan,)}})
    hold = seen.batch_range("sam", 1.0)
    assert (hold.up_to, hold.falls_at, hold.fall) == (192, 384, None)
    assert "192; no accuracy at 384" in tables.cost(seen, 1.0).markdown()


def test_speed_up_has_a_line_for_a_fixed_batch_and_one_for_a_fixed_share(tmp_path):
    for ranks, batch, seconds in ((1, 64, 8.0), (2, 64, 5.0), (2, 128, 9.0), (4, 128, 6.0)):
        made_up.run(tmp_path / f"{ranks}-{batch}", batch=batch, ranks=ranks, seconds=seconds)
    lines = scaling.series(study.study(runs.find([str(tmp_path)])))
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


def styles(folder, names) -> dict:
    seen = made(folder, {name: {192: (0.9,)} for name in names})
    return scaling.accuracy(seen, width=300, height=200).styles


def test_every_method_has_a_colour_and_a_marker_that_are_the_same_in_every_study(tmp_path):
    """Markers followed the order within a study: look_sam was a triangle in one, a cross in the
    other."""
    every = styles(tmp_path / "all", METHODS)
    assert len({style.colour for style in every.values()}) == len(METHODS)
    assert len({style.shape for style in every.values()}) == len(METHODS)
    for name in METHODS:
        assert styles(tmp_path / name, [name]) == {name: every[name]}


def test_a_new_base_changes_the_colour_and_marker_of_no_other_method(tmp_path, monkeypatch):
    """A fifth base moved those of sam and all after it: pictures of two versions differed."""
    before = styles(tmp_path / "before", METHODS)
    rows = dict.fromkeys(["sgd", "adamw", "lamb", "lars"]) | {"nadam": METHODS["adamw"]} | METHODS
    # In a copy: what monkeypatch puts back into a dict stands last, and order is what counts here.
    monkeypatch.setattr(panels, "METHODS", rows)
    after = {name: panels._own(panels._COLOURS, name) for name in rows}
    assert {name: after[name] for name in before} == {n: s.colour for n, s in before.items()}
    assert after["nadam"] not in {style.colour for style in before.values()}


def test_variants_of_a_method_have_its_marker_and_a_colour_of_no_method(tmp_path):
    for label in ("look_sam", "a variant", "another"):
        point = {"method": "look_sam", "label": label, "stage": "final", "batch_size": 192}
        made_up.run(tmp_path / label, "look_sam", point=point | {"seed": 0})
    seen = study.study(runs.find([str(tmp_path)]))
    drawn = scaling.accuracy(seen, width=300, height=200).styles
    every = styles(tmp_path / "all", METHODS)
    assert drawn["look_sam"] == every["look_sam"]
    assert {style.shape for style in drawn.values()} == {every["look_sam"].shape}
    colours = {drawn["a variant"].colour, drawn["another"].colour}
    assert len(colours) == 2 and not colours & {style.colour for style in every.values()}


def test_a_new_row_of_the_table_of_methods_is_reported(tmp_path, monkeypatch):
    """A method that the table of colours did not know ended the report in a KeyError."""
    monkeypatch.setitem(METHODS, "new_sam", METHODS["look_sam"])
    monkeypatch.setitem(METHODS, "newer_sam", replace(METHODS["look_sam"], ascent="new"))
    every = styles(tmp_path, METHODS)
    assert len({style.colour for style in every.values()}) == len(METHODS)
    report([str(tmp_path)], out=tmp_path / "out")


def test_every_point_stands_at_its_batch(tmp_path):
    """Each method was moved sideways by up to 1.5 times the batch, always in the same order, and
    seemed to hold the further for it."""
    batches = {192: (0.9, 0.91), 384: (0.8, 0.81)}
    seen = made(tmp_path, {name: batches for name in ("adamw", "lamb", "sam", "look_sam")})
    chart = scaling.picture(seen, "title", []).to_dict(validate=False)
    rows = [row for data in chart["datasets"].values() for row in data if "x" in row]
    assert len(rows) > 16 and {row["x"] for row in rows} == {192, 384}
    for row in rows:
        assert "batch" not in row or row["batch"] == f"{row['x']:,}"


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
