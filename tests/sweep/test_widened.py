"""Sweeps of the paper in miniature: batches of ImageNet, grids that widen, points that are kept."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_looksam.cli.main import main
from dist_looksam.errors import ConfigError
from dist_looksam.report import runs
from dist_looksam.sweep import grid
from dist_looksam.sweep.ledger import Ledger
from dist_looksam.sweep.widen import edges, next_candidate

SWEEP = {
    "settings": {
        "data": "digits", "train_images": 512, "model": "vit_8", "steps": 3, "device": "cpu",
        "workers": 0, "augment": "none",
    },
    "imagenet_batch": [65536, 163840],
    "batch_multiple": 2,
    "seeds": [0],
    "tune": {"imagenet_batch": [65536], "seed": 9, "holdout": 100, "widen": 2},
    "methods": {
        "adamw": {"tune": {"lr": [0.002, 0.004]}},
        "sam": {"micro_batch": "batch/4", "tune": {"lr": [0.002], "rho": [0.1, 0.05]}},
    },
}  # fmt: skip


def read(folder: Path, **changed) -> grid.Grid:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, **changed}))
    return grid.read(path)


def test_batches_are_the_same_share_of_the_images_as_on_imagenet(tmp_path):
    """512 images: 65,536 and 163,840 of 1,281,167 are 26.2 and 65.5 of them."""
    sweep = read(tmp_path)
    assert (sweep.batch_sizes, sweep.tuned_at) == ([26, 66], [26])
    pilot = {**SWEEP["settings"], "train_images": 4096}
    tune = {**SWEEP["tune"], "imagenet_batch": 65536}
    large = read(tmp_path, settings=pilot, batch_multiple=4, imagenet_batch=65536, tune=tune)
    assert large.batch_sizes == [208]


def test_each_seed_starts_from_the_weights_of_its_own_seed(tmp_path):
    settings = {**SWEEP["settings"], "init": "runs/a/final/adamw-b208-s{seed}"}
    sweep = read(tmp_path, settings=settings, seeds=[0, 3])
    points = [sweep._point("adamw", "final", 26, seed, {}) for seed in (0, 3)]
    starts = [point.flags["init"] for point in points]
    assert starts == ["runs/a/final/adamw-b208-s0", "runs/a/final/adamw-b208-s3"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"batch_size": [8]}, "must not both be given"),
        ({"imagenet_batch": [4096, 4097]}, "imagenet_batch on 512 images must be different"),
        ({"settings": {"data": "digits"}}, "needs train_images among the settings, got None"),
        ({"batch_multiple": 0}, "batch_multiple must be whole numbers >= 1"),
        ({"tune": {**SWEEP["tune"], "widen": -1}}, "widen must be whole numbers >= 0"),
        ({"methods": {"adamw": {"micro_batch": "batch/0"}}, "tune": None}, "or batch/N for an N"),
    ],
)
def test_a_mistake_in_the_new_keys_is_one_sentence(tmp_path, changed, says):
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, **changed)


@pytest.mark.parametrize(
    ("batch", "part", "images"),
    [(208, "batch/16", 13), (52, "batch/16", 4), (12, "batch/16", 4), (26, "batch/4", 13),
     (7, "batch/2", 7), (2, "batch/2", 2), (64, 8, 8)],
)  # fmt: skip
def test_a_part_of_the_batch_is_its_nearest_divisor_of_at_least_four(batch, part, images):
    assert grid._part(part, batch, "m") == images


def test_a_part_of_the_batch_is_resolved_at_each_batch(tmp_path):
    sweep = read(tmp_path)
    finals = list(sweep.finals({("sam", 26): {}, ("adamw", 26): {}}))
    parts = {p.batch_size: p.flags["micro_batch"] for p in finals if p.label == "sam"}
    assert parts == {26: 13, 66: 22}  # 6.5 and 16.5: 13/6.5 is nearer to 1 than 26/6.5


def test_the_best_at_an_edge_moves_the_grid_beyond_it_by_the_same_ratio():
    tried = [{"lr": lr, "rho": rho} for lr in (0.01, 0.02) for rho in (0.1, 0.2, 0.4)]
    assert edges(tried, [0, 0, 0, 0, 9, 0]) == ["lr"]
    assert next_candidate(tried, [0, 0, 0, 0, 9, 0]) == {"lr": 0.04, "rho": 0.2}
    assert next_candidate(tried, [9, 0, 0, 0, 0, 0]) == {"lr": 0.005, "rho": 0.1}
    wider = [*tried, {"lr": 0.005, "rho": 0.1}]
    assert next_candidate(wider, [8, 0, 0, 0, 0, 0, 7]) == {"lr": 0.01, "rho": 0.05}
    assert next_candidate(wider, [0, 9, 0, 0, 0, 0, 7]) is None  # lr .01 has .005 below it now
    assert next_candidate([{"k": 2}, {"k": 4}], [0, 1]) == {"k": 8}
    assert next_candidate([{"alpha": 0.0}, {"alpha": 1.0}], [1, 0]) is None
    assert next_candidate([{"lr": 0.01}], [1]) is None


@pytest.mark.parametrize(("name", "values", "next_"), [
    ("ema", [0.99, 0.999], None), ("layer_decay", [0.75, 0.9], None), ("m", [8, 16], None),
    ("drop_path", [0.2, 0.3], 0.45),
])  # fmt: skip
def test_a_grid_is_not_widened_beyond_what_a_setting_may_be(name, values, next_, tmp_path):
    """The trial was refused, whatever was called again, and the method never had its final runs."""
    kind = "sam" if name == "m" else "adamw"
    sweep = read(tmp_path, methods={kind: {"tune": {name: values}}})
    ledger = Ledger(sweep, tmp_path / "out")
    for trial, top1 in zip(sweep.trials(kind, 26), (0.1, 0.2), strict=True):
        done(ledger, trial, top1)
    trials = ledger.tuning(kind, 26).trials
    assert [trial.tuned[name] for trial in trials] == [*values, *([next_] if next_ else [])]
    assert bool(ledger.chosen()) == (next_ is None)


def done(ledger: Ledger, point: grid.Point, top1: float) -> None:
    """What a finished point leaves."""
    ledger.prepare(point)
    path = ledger.path(point)
    (path / "summary.json").write_text(json.dumps({"top1": top1, "steps": 3}))
    job = {"host": "node1", "ranks": 1, "commit": "abc", "device": "EPYC", "torch": "2.13.0"}
    (path / "job.json").write_text(json.dumps(job))
    flags = {"base": "adamw", "out": str(path), **point.flags}
    (path / "config.yaml").write_text(yaml.safe_dump(flags))
    lines = [
        {"step": t, "loss": 1.0, "look": t % 5 == 0, "skipped": t == 7, "gv_ratio": 0.5}
        for t in range(1000)
    ]
    lines.insert(500, {"step": 500, "eval_top1": 0.5, "eval_loss": 1.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_grid_widens_within_its_budget_and_an_edge_that_is_left_is_reported(tmp_path):
    """adamw is always better with a larger lr: two more trials, and the edge is named. sam's best
    rho becomes an inner one after one more trial."""
    ledger = Ledger(read(tmp_path), tmp_path / "out")
    rounds = 0
    while due := [p for p in ledger.due()[0] if p.stage == "tune"]:
        for point in due:
            rho = point.tuned.get("rho")
            done(ledger, point, point.tuned["lr"] if rho is None else 1 - abs(rho - 0.05))
        rounds += 1
    assert rounds == 3
    ledger.save_choices()
    chosen = json.loads((tmp_path / "out/choices.json").read_text())
    assert chosen["adamw"]["26"] == {"lr": 0.016, "trials": 4, "score": 0.016, "at_edge": ["lr"]}
    assert chosen["sam"]["26"] == {"lr": 0.002, "rho": 0.05, "trials": 3, "score": 1.0}
    assert ledger.total == 2 * 2 + 3 + 2 * 2


def test_a_method_runs_its_final_points_before_the_next_one_is_tuned(tmp_path):
    ledger = Ledger(read(tmp_path), tmp_path / "out")
    while (first := ledger.due()[0][0]).stage == "tune":
        assert first.label == "adamw"
        done(ledger, first, 1 - first.tuned["lr"])
    order = [(p.label, p.stage) for p in ledger.due()[0]]
    assert order == [("adamw", "final")] * 2 + [("sam", "tune")] * 2


def test_kept_points_are_done_elsewhere_and_make_the_same_report(tmp_path):
    sweep, keep = read(tmp_path), tmp_path / "kept"
    here = Ledger(sweep, tmp_path / "here", keep)
    first = sweep.trials("adamw", 26)[0]
    done(here, first, 0.4)
    here.keep_copies()
    copies = list((keep / first.name).iterdir())
    assert sum(path.stat().st_size for path in copies) < 10_000
    assert not [p for p in copies if str(tmp_path) in p.read_text() or "node1" in p.read_text()]
    job = json.loads((keep / first.name / "job.json").read_text())
    assert (job["device"], job["torch"]) == ("EPYC", "2.13.0")
    there = Ledger(sweep, tmp_path / "there", keep)
    assert first.name not in {p.name for p in there.due()[0]} and there.due()[1] == [first]
    reports = [runs.find([str(folder)]).runs[0] for folder in (tmp_path / "here", keep)]
    for name in ("top1", "gv_ratio", "skipped", "state", "tuned", "commit", "world_size"):
        assert getattr(reports[0], name) == getattr(reports[1], name), name
    assert reports[0].config == {**reports[1].config, "out": reports[0].config["out"]}
    other = {**SWEEP["settings"], "steps": 4}
    elsewhere = Ledger(read(tmp_path, settings=other), tmp_path / "elsewhere", keep)
    assert elsewhere.due()[1] == []  # kept of other settings
    done(elsewhere, elsewhere.grid.trials("adamw", 26)[0], 0.7)
    elsewhere.keep_copies()  # beside the new sweep.yaml and table, an old accuracy would be wrong
    assert [run.top1 for run in runs.find([str(keep)]).runs] == [0.7]
    assert [p.name for p in Ledger(elsewhere.grid, tmp_path / "x", keep).due()[1]] == [first.name]


def test_a_dry_run_beside_kept_trials_makes_nothing(tmp_path, capsys):
    """It ended in a traceback: with all trials of a method kept, it wrote choices.json into the
    folder that it must not make."""
    kept = Ledger(read(tmp_path), tmp_path / "kept")
    for trial in kept.grid.trials("adamw", 26):
        done(kept, trial, 1 - trial.tuned["lr"])
    for more in kept.due()[0][:1]:
        done(kept, more, 0.1)
    out, file = tmp_path / "out", str(tmp_path / "sweep.yaml")
    before = sorted((tmp_path / "kept").rglob("*"))
    flags = ["--out", str(out), "--keep", str(tmp_path / "kept"), "--dry_run"]
    assert main(["sweep", file, *flags]) == 0
    assert "final/adamw-b66-s0 " in (told := capsys.readouterr().out), told
    assert not out.exists() and sorted((tmp_path / "kept").rglob("*")) == before


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
@pytest.mark.parametrize("keep", ["file", "file/kept"])
def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path, capsys, keep, more):
    """A dry run beside a file took it for a folder without points: "0 are done"."""
    read(tmp_path)
    (tmp_path / "file").write_text("")
    flags = ["--out", str(tmp_path / "out"), "--keep", str(tmp_path / keep), *more]
    assert main(["sweep", str(tmp_path / "sweep.yaml"), *flags]) == 2
    assert "keep must be a folder that can be written, got" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_of_another_machine_goes_on_from_what_was_kept(tmp_path):
    file = tmp_path / "sweep.yaml"
    plain = {"methods": {"adamw": {}}, "imagenet_batch": [65536], "tune": None}
    file.write_text(yaml.safe_dump({**SWEEP, **plain, "seeds": [0, 1]}))

    def run(name):
        command = ["-m", "dist_looksam.cli.main", "sweep", str(file), "--out", str(tmp_path / name)]
        keep = ["--keep", str(tmp_path / "kept")]
        ended = subprocess.run(
            [sys.executable, *command, *keep], capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    assert "2 points, 0 done before" in run("here")
    told = run("there")
    assert "2 points, 2 done before" in told
    assert (tmp_path / "here/table.md").read_text() == (tmp_path / "kept/table.md").read_text()
    assert not (tmp_path / "there/final").exists()
