"""What a report finds in folders, and what it tells of runs that do not count."""

import csv
import json
import math
import shutil

import made_up
import pytest

from dist_looksam.cli import main as cli
from dist_looksam.report import runs, study
from dist_looksam.report.comparison import report
from dist_looksam.report.statistic import MeanSd
from dist_looksam.report.tuning import tunings, warnings


def point(label: str, batch: int, seed: int, stage: str = "final", **tuned) -> dict:
    method = label if label in made_up.METHODS else "look_sam"
    rest = {"batch_size": batch, "seed": seed, "tuned": tuned, "flags": {"clip": 1.0, **tuned}}
    return {"method": method, "label": label, "stage": stage, **rest}


def notes(folder) -> str:
    return "\n".join(study.study(runs.find([str(folder)])).notes)


def test_every_run_is_found_however_deep_and_a_linked_one_once(tmp_path):
    deep = made_up.run(tmp_path / "a" / "b" / "c", seed=0)
    made_up.run(tmp_path / "d", seed=1)
    (tmp_path / "link").symlink_to(deep)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "report").mkdir()
    found = runs.find([str(tmp_path), str(tmp_path / "a")])
    assert sorted(run.seed for run in found.runs) == [0, 1]


def test_without_a_sweep_a_run_is_named_by_its_optimizer_and_an_unusual_base(tmp_path):
    made_up.run(tmp_path / "a", "look_sam", batch=64, seed=3, gv_ratio=0.4)
    made_up.run(tmp_path / "b", "look_sam", base="lamb")
    first, second = runs.find([str(tmp_path)]).runs
    assert (first.label, first.stage, first.batch, first.seed) == ("look_sam", "final", 64, 3)
    assert second.label == "look_sam on lamb"
    # looks at steps 0, 5 and 10 of twelve; the median is the middle one's
    assert first.gv_ratio == pytest.approx(
        sorted(0.4 * (1 + 0.1 * math.sin(t)) for t in (0, 5, 10))[1]
    )


def test_a_sweep_says_what_a_run_is(tmp_path):
    made_up.run(tmp_path / "x", "look_sam", lr=0.5, point=point("mine", 768, 7, rho=0.1))
    (run,) = runs.find([str(tmp_path)]).runs
    assert (run.label, run.batch, run.seed) == ("mine", 768, 7)
    assert run.tuned == {"rho": 0.1}
    assert (run.setting("rho"), run.setting("lr"), run.setting("clip")) == (0.1, 0.5, 1.0)


def test_an_unfinished_run_is_named_and_does_not_count(tmp_path):
    made_up.run(tmp_path / "a", seed=0, top1=0.9)
    made_up.run(tmp_path / "b", seed=1, done=False)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "point.json").write_text(json.dumps(point("lamb", 384, 2)))
    seen = study.study(runs.find([str(tmp_path)]))
    assert [cell.top1.n for cell in seen.cells.values()] == [1]
    (note,) = seen.notes
    assert note.startswith("2 runs of 3 are not finished")
    assert "adamw, batch 192, seed 1" in note and "lamb, batch 384, seed 2" in note


def test_of_two_runs_of_one_seed_the_latest_counts_and_both_are_named(tmp_path):
    made_up.run(tmp_path / "old", top1=0.1, started=1.0)
    made_up.run(tmp_path / "new", top1=0.9, started=2.0)
    seen = study.study(runs.find([str(tmp_path)]))
    assert seen.cells["adamw", 192].top1.mean == 0.9
    (note,) = seen.notes
    assert str(tmp_path / "old") in note and str(tmp_path / "new") in note


def test_a_seed_on_more_ranks_counts_once_for_accuracy(tmp_path):
    """The same seed gives the same weights on any number of ranks: twice would halve the spread."""
    for ranks in (1, 2):
        made_up.run(tmp_path / f"{ranks}", ranks=ranks)
    seen = study.study(runs.find([str(tmp_path)]))
    assert seen.cells["adamw", 192].top1.n == 1 and len(seen.finals) == 2
    assert not seen.notes


def test_a_diverged_run_counts_and_is_told(tmp_path):
    made_up.run(tmp_path / "a", seed=0, top1=0.9)
    made_up.run(tmp_path / "b", seed=1, top1=0.1, lost=True)
    made_up.run(tmp_path / "c", seed=2, top1=0.8, skipped=3)
    seen = study.study(runs.find([str(tmp_path)]))
    assert seen.cells["adamw", 192].top1.mean == pytest.approx(0.6)
    assert "seed 1 counts, but its last loss was not finite." in "\n".join(seen.notes)
    assert "seed 2 counts, but 3 of 12 steps were skipped." in "\n".join(seen.notes)


def test_a_lost_run_keeps_its_method_from_being_called_best(tmp_path):
    """The mean over the seeds that survived is not the method's."""
    for seed in range(3):
        nan = seed == 2
        made_up.run(tmp_path / f"a{seed}", "sam", seed=seed, top1=math.nan if nan else 0.9)
        made_up.run(tmp_path / f"b{seed}", seed=seed, top1=0.5 + 0.001 * seed)
    seen = study.study(runs.find([str(tmp_path)]))
    assert seen.best(192) == ["sam", "adamw"] and seen.leader(192) is None
    assert "sam, batch 192, seed 2 has no accuracy and does not count" in "\n".join(seen.notes)


def test_what_makes_a_comparison_unfair_is_told(tmp_path):
    made_up.run(tmp_path / "a", "adamw", steps=10)
    made_up.run(tmp_path / "b", "sam", steps=20, data="digits")
    told = notes(tmp_path)
    assert "different numbers of steps: adamw: 10; sam: 20." in told
    assert "The runs differ in data: digits, fashion_mnist." in told


def test_runs_of_one_cell_that_differ_in_more_than_their_seed_are_told(tmp_path):
    """Runs of other settings were averaged as if they were seeds, in silence."""
    for seed in range(2):
        made_up.run(tmp_path / f"a{seed}", "sam", seed=seed, clip=1.0, out=f"{seed}", micro_batch=8)
        made_up.run(tmp_path / f"b{seed}", "look_sam", seed=seed, lr=0.01 + seed, k=5 + seed)
        made_up.run(tmp_path / f"c{seed}", "adamw", seed=seed, k=5 + seed)  # which has no k
    made_up.run(tmp_path / "a2", "sam", seed=2, out="2", micro_batch=16)
    told = study.study(runs.find([str(tmp_path)])).notes
    assert told == [
        "look_sam, batch 192: mean and spread are over runs of different settings: k 5 (seed 0) "
        "and 6 (seed 1); lr 0.01 (seed 0) and 1.01 (seed 1).",
        "sam, batch 192: mean and spread are over runs of different settings: clip 1 (seed 0, 1) "
        "and not set (seed 2).",
    ]


def test_accuracy_on_held_out_images_is_not_mixed_with_that_on_test_images(tmp_path):
    made_up.run(tmp_path / "a", seed=0, top1=0.9)
    made_up.run(tmp_path / "b", seed=1, top1=0.5, holdout=5000)
    made_up.run(tmp_path / "c", "sam", top1=0.5, holdout=5000)
    seen = study.study(runs.find([str(tmp_path)]))
    assert set(seen.cells) == {("adamw", 192)} and seen.cells["adamw", 192].by_seed == {0: 0.9}
    (note,) = seen.notes
    assert note.startswith("Left out: 2 final runs evaluated on held-out training images")
    shutil.rmtree(tmp_path / "a")
    seen = study.study(runs.find([str(tmp_path)]))
    assert set(seen.cells) == {("adamw", 192), ("sam", 192)}
    assert seen.notes == ["Accuracy is of 5,000 held-out training images, not of the test images."]


def test_two_sweeps_that_chose_for_the_same_point_are_told(tmp_path):
    """The choice that was read last won, without a word."""
    for name, choice in (("x", 0.2), ("y", 0.4)):
        (tmp_path / name).mkdir()
        for label in ("adamw", "lamb"):
            trials(tmp_path / name, label, (0.1, 0.2, 0.4, 0.8), choice)
    found = runs.find([str(tmp_path)])
    (note,) = found.notes
    first, second = (tmp_path / name / "choices.json" for name in "xy")
    assert note.startswith(f"{first} and {second} both chose for adamw, batch 192 and 1 more:")
    assert found.choices["adamw", 192].flags == {"lr": 0.4}
    assert not runs.find([str(tmp_path / "x")]).notes


def test_damaged_files_are_told_and_the_rest_is_reported(tmp_path):
    made_up.run(tmp_path / "good")
    bad = made_up.run(tmp_path / "bad", seed=1)
    (bad / "summary.json").write_text('{"top1": 0.')
    odd = made_up.run(tmp_path / "odd", seed=2)
    (odd / "config.yaml").write_text("batch_size: [")
    told = notes(tmp_path)
    assert f"{bad} could not be read and is left out" in told
    assert f"{odd} could not be read and is left out" in told


def test_runs_of_settings_that_a_sweep_dropped_are_left_out_and_counted(tmp_path):
    made_up.run(tmp_path / "a")
    made_up.run(tmp_path / "b", top1=0.1, seed=1, point=point("adamw", 192, 1, "superseded"))
    seen = study.study(runs.find([str(tmp_path)]))
    assert seen.cells["adamw", 192].top1.n == 1
    assert seen.notes == ["Left out: 1 run of settings that the sweep has dropped."]


def test_points_that_a_sweep_has_not_begun_are_counted(tmp_path):
    made_up.sweep(tmp_path, labels=["adamw", "sam"], batches=(192, 384), trials=False)
    grid = "methods: {adamw: {}, sam: {}}\nbatch_size: [192, 384]\nseeds: [0, 1, 2]\n"
    (tmp_path / "sweep.yaml").write_text(grid)
    shutil.rmtree(tmp_path / "final" / "sam-384-1")
    text = report([str(tmp_path)], out=tmp_path / "report").text
    assert "1 of 12 final runs" in text and "the first sam, batch 384, seed 1" in text


def test_points_of_batches_of_imagenet_that_have_not_begun_are_counted(tmp_path):
    made_up.sweep(tmp_path, labels=["adamw"], batches=(208,), trials=False)
    grid = (
        "methods: {adamw: {}, sam: {}}\nsettings: {train_images: 4096}\nseeds: [0, 1, 2]\n"
        "imagenet_batch: [65536]\nbatch_multiple: 16\n"
    )
    (tmp_path / "sweep.yaml").write_text(grid)
    text = report([str(tmp_path)], out=tmp_path / "report").text
    assert "3 of 6 final runs" in text and "the first sam, batch 208, seed 0" in text


def test_runs_that_a_sweep_no_longer_asks_for_are_named(tmp_path):
    """A label that had left sweep.yaml was shown without a word."""
    made_up.sweep(tmp_path, labels=["adamw", "sam"], batches=(192,), trials=False)
    (tmp_path / "sweep.yaml").write_text("methods: {adamw: {}}\nbatch_size: 192\nseeds: [0, 1, 2]")
    made_up.run(tmp_path / "other" / "run", seed=5)
    text = report([str(tmp_path)], out=tmp_path / "report").text
    assert f"3 runs that {tmp_path}/sweep.yaml no longer asks for, the first" in text
    assert f"{tmp_path}/final/sam-192-0" in text and "have not begun" not in text


def trials(folder, label, lrs, choice, batch=192):
    for lr in lrs:
        made_up.run(
            folder / f"{label}-{lr}", label, lr=lr, point=point(label, batch, 0, "tune", lr=lr)
        )
    path = folder / "choices.json"
    chosen = json.loads(path.read_text()) if path.exists() else {}
    chosen[label] = {str(batch): {"lr": choice, "trials": len(lrs), "score": 0.9}}
    path.write_text(json.dumps(chosen))


def tuning_notes(folder):
    return warnings(tunings(runs.find([str(folder)]), []))


def test_a_choice_at_the_edge_of_its_grid_is_warned_of(tmp_path):
    trials(tmp_path, "adamw", (0.1, 0.2, 0.4), 0.4)
    trials(tmp_path, "lamb", (0.1, 0.2, 0.4), 0.2)
    trials(tmp_path, "sam", (0.1, 0.2, 0.4), 0.1)
    first, second = tuning_notes(tmp_path)
    assert first.startswith("adamw, batch 192: the chosen lr 0.4 is the largest that was tried")
    assert second.startswith("sam, batch 192: the chosen lr 0.1 is the smallest that was tried")


def test_two_values_have_no_inside(tmp_path):
    trials(tmp_path, "adamw", (0.1, 0.2), 0.2)
    (note,) = tuning_notes(tmp_path)
    assert "only two values of lr were tried, 0.1 and 0.2" in note


def test_unequal_budgets_are_told(tmp_path):
    trials(tmp_path, "adamw", (0.1, 0.2, 0.4), 0.2)
    trials(tmp_path, "lamb", (0.1, 0.2, 0.4, 0.8), 0.2)
    (note,) = tuning_notes(tmp_path)
    assert note == "At batch 192 the methods had different budgets of trials: adamw: 3; lamb: 4."


def test_trials_count_in_no_mean(tmp_path):
    trials(tmp_path, "adamw", (0.1, 0.2), 0.2)
    made_up.run(tmp_path / "final", top1=0.5)
    seen = study.study(runs.find([str(tmp_path)]))
    assert seen.cells["adamw", 192].top1 == MeanSd((0.5,))


def test_report_csv_has_every_run_trials_and_unfinished_ones_too(tmp_path):
    made_up.sweep(tmp_path / "s", labels=["adamw", "look_sam (natural)"], batches=(192,))
    made_up.run(tmp_path / "s" / "late", seed=9, done=False)
    report([str(tmp_path)], out=tmp_path / "out")
    with open(tmp_path / "out" / "report.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 + 6) + 1
    assert [row["seed"] for row in rows if row["state"] == "unfinished"] == ["9"]
    row = next(r for r in rows if r["label"] == "look_sam (natural)" and r["stage"] == "final")
    truth = json.loads((tmp_path / "s/final/look_sam (natural)-192-0/summary.json").read_text())
    for name in ("top1", "seconds", "images_per_s", "steps"):
        assert float(row[name]) == truth[name]
    assert float(row["passes"]) == truth["forward_backward_passes"]
    assert (row["lr"], row["rho"], row["k"]) == ("0.002", "0.02", "5")


@pytest.mark.parametrize("folder", ["empty", "missing", "file"])
def test_folders_without_runs_are_one_sentence_and_exit_code_2(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(tmp_path / folder)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: a report needs folders that hold runs") and folder in told
    assert len(told.splitlines()) == 1 and "Traceback" not in told


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--points", "-1"], "points must be > 0"),
        (["--points", "x"], "--points"),
        (["--reference", "nowhere.yaml"], "reference must be a YAML file, got nowhere.yaml"),
        (["--reference", "bad.yaml"], "reference must hold title, source and figures"),
        ([], "the following arguments are required: DIR"),
    ],
)
def test_wrong_arguments_are_one_sentence(flags, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_up.run(tmp_path / "run")
    (tmp_path / "bad.yaml").write_text(
        "title: a\nsource: b\nfigures: [{method: sam, batch: 4, top1: 79.8}]\n"
    )
    assert cli.main(["report", *(["run"] if flags else []), *flags]) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "method,state\nno_such,finished\n"])
def test_a_csv_that_is_no_reports_is_one_sentence(text, tmp_path, capsys):
    (tmp_path / "x.csv").write_text(text)
    assert cli.main(["report", str(tmp_path / "x.csv")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: a ") and len(error.splitlines()) == 1 and "x.csv" in error


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    made_up.run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "file" / "x")]) == 1
    assert capsys.readouterr().err.startswith("error: the report cannot be written to")
