"""`dist-looksam flatness`, from a training to its file, the table, the picture and the report."""

import json
import re
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from dist_looksam.cli.main import main
from dist_looksam.flatness.groups import grouped, unlike
from dist_looksam.flatness.measures import Measurement
from dist_looksam.run.train import main as train

pytestmark = pytest.mark.slow
QUICK = [
    *("--samples", "80", "--test_samples", "40", "--m", "32", "--rho", "0.05", "--layer_rho"),
    *("0.002", "--iterations", "3", "--eigenvalues", "1", "--probes", "2", "--points", "3"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of two seeds, with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        flags = ["--data", "digits", "--optimizer", "adamw", "--steps", "8", "--save_every", "4"]
        flags += ["--seed", str(seed), "--out", str(folder / f"adamw-{seed}"), "--device", "cpu"]
        assert train([*flags, "--batch_size", "64", "--drop_path", "0.5"]) == 0
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs")
    return [tmp_path / "runs" / f"adamw-{seed}" for seed in (0, 1)]


def flatness(*arguments) -> int:
    return main(["flatness", *map(str, arguments), "--device", "cpu"])


def read(path) -> dict:
    return json.loads(path.read_text())


def test_two_seeds_give_their_files_one_row_with_its_spread_and_a_picture(runs, capsys):
    assert flatness(*runs, *QUICK) == 0
    printed = capsys.readouterr()
    assert "adamw  2" in printed.out and "±" in printed.out and "ETA" in printed.err
    assert (runs[0].parent / "flatness.png").read_bytes().startswith(b"\x89PNG")
    first, second = (read(run / "flatness.json") for run in runs)
    assert first.keys() == second.keys() >= {"at_w", "ascent", "eigenvalues", "trace", "lines",
                                             "rounding", "settings", "config", "label"}  # fmt: skip
    assert first["settings"]["samples"] == 64  # whole groups of 32
    assert first["step"] is None and first["parameters"] == 202_058
    kinds = {(r["scope"], r["direction"], r["m"]) for r in first["ascent"]}
    both = ("gradient", 64), ("gradient", 32), ("random", None)
    assert kinds == {(scope, *kind) for scope in ("model", "layer") for kind in both}
    assert first["at_w"] != second["at_w"]


def test_top1_at_w_over_all_test_images_is_the_runs_own(runs):
    """Drop-path is off, though the run trained with a rate of 0.5."""
    assert flatness(runs[0], *QUICK, "--test_samples", "360") == 0
    summary = read(runs[0] / "summary.json")
    assert read(runs[0] / "flatness.json")["at_w"]["test"]["top1"] == summary["top1"]


def test_a_checkpoint_in_the_middle_has_a_file_of_its_own_and_other_numbers(runs):
    assert flatness(runs[0], *QUICK, "--step", "4") == 0
    assert flatness(runs[0], *QUICK) == 0
    middle, end = (read(runs[0] / f"flatness{x}.json") for x in ("-step-4", ""))
    assert (middle["step"], middle["weights"]) == (4, "checkpoints/step-4")
    assert middle["at_w"]["train"]["loss"] != end["at_w"]["train"]["loss"]


def test_the_final_weights_are_those_of_the_last_checkpoint(runs, tmp_path):
    for step in ([], ["--step", "8"]):
        assert flatness(runs[0], *QUICK, *step, "--out", tmp_path / f"out{len(step)}") == 0
    files = [read(tmp_path / f"out{n}" / "flatness.json")["runs"][0] for n in (0, 2)]
    for name in ("trace", "at_w"):
        first, second = (flattened(file[name]) for file in files)
        assert first == pytest.approx(second, rel=1e-4)
    assert not (runs[0] / "flatness.json").exists()


def flattened(content) -> list[float]:
    """All numbers of nested dictionaries."""
    parts = content.values() if isinstance(content, dict) else None
    return [content] if parts is None else [x for part in parts for x in flattened(part)]


def test_what_was_measured_already_is_not_measured_again(runs, tmp_path, monkeypatch, capsys):
    """Also side by side, in --out; other weights, other settings and --again are measured."""
    assert flatness(runs[0], *QUICK) == 0
    monkeypatch.setattr(Measurement, "all", lambda self: 1 / 0)
    assert flatness(runs[0], *QUICK, "--out", tmp_path / "out") == 0
    assert "was measured already" in capsys.readouterr().err
    own = read(runs[0] / "flatness.json")
    assert read(tmp_path / "out" / "flatness.json")["runs"] == [own]
    for flags in (["--again"], ["--seed", "1"]):
        with pytest.raises(ZeroDivisionError):
            flatness(runs[0], *QUICK, *flags)
    text = (runs[0] / "config.yaml").read_text()
    (runs[0] / "config.yaml").write_text(text.replace("holdout: 0\n", "holdout: 50\n"))
    with pytest.raises(ZeroDivisionError):  # of other images
        flatness(runs[0], *QUICK)
    (runs[0] / "config.yaml").write_text(text)
    shutil.copy(runs[1] / "model.safetensors", runs[0])
    with pytest.raises(ZeroDivisionError):
        flatness(runs[0], *QUICK)


def test_a_command_that_was_ended_goes_on_after_the_runs_that_it_has_measured(
    runs, tmp_path, monkeypatch
):
    """With --out, too, whose file it replaces after every run."""
    out = tmp_path / "out"
    assert flatness(runs[0], *QUICK, "--out", out) == 0
    begun = []
    whole = Measurement.all
    monkeypatch.setattr(Measurement, "all", lambda self: begun.append(1) or whole(self))
    assert flatness(*runs, *QUICK, "--out", out) == 0
    assert len(begun) == 1 and len(read(out / "flatness.json")["runs"]) == 2


def test_json_on_the_terminal_is_json_alone(runs, capsys):
    assert flatness(runs[0], *QUICK, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert [run["label"] for run in content["runs"]] == ["adamw"]


def test_a_config_of_another_version_lacks_and_has_other_settings(runs):
    file = runs[0] / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for name in ("train_images", "holdout", "image_size", "reuse", "drop_path"):
        del config[name]
    file.write_text(yaml.safe_dump(config | {"setting_of_another_version": 3}))
    assert flatness(runs[0], *QUICK) == 0


def test_an_interrupted_measurement_leaves_the_older_file_whole(runs, monkeypatch):
    (runs[0] / "flatness.json").write_text("{}\n")

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Measurement, "all", interrupted)
    assert flatness(runs[0], *QUICK) == 130
    assert (runs[0] / "flatness.json").read_text() == "{}\n"


def test_a_report_shows_flatness_and_a_run_that_goes_on_drops_it(runs, capsys):
    assert flatness(*runs, *QUICK) == 0
    capsys.readouterr()
    assert main(["report", str(runs[0].parent)]) == 0
    assert "**Flatness.**" in capsys.readouterr().out
    report = runs[0].parent / "report"
    assert (report / "flatness.png").exists() and "Flatness" in (report / "index.html").read_text()
    flags = ["--config", str(runs[0] / "config.yaml"), "--out", str(runs[0])]
    assert train([*flags, "--steps", "9", "--warmup_steps", "0", "--resume", "auto"]) == 0
    assert not (runs[0] / "flatness.json").exists()


# Mistakes.


def spoil(run, how: str) -> list[str]:
    """Makes a mistake in a run directory; returns flags that go with it."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    if how == "no weights":
        (run / "model.safetensors").unlink()
    if how == "no run":
        shutil.rmtree(run)
    if how == "not yaml":
        (run / "config.yaml").write_text("a: [")
    changes = {"model": {"model": "vit_none"}, "other": {"model": "vit_s16", "image_size": 8},
               "data": {"data": "folder", "data_dir": "/no/such/folder"},
               "data name": {"data": "nothing"}}  # fmt: skip
    if how in changes:
        (run / "config.yaml").write_text(yaml.safe_dump(config | changes[how]))
    if how == "other sizes":
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"model": "vit_28_p4"}))
    return {"step": ["--step", "5"], "m": ["--m", "81"], "rho": ["--rho", "0"],
            "count": ["--eigenvalues", "9"],
            "out": ["--out", str(run / "config.yaml")]}.get(how, [])  # fmt: skip


@pytest.mark.parametrize("how, sentence", [
    ("no weights", r"RUN must hold model.safetensors, .*; use --step 8\."),
    ("no run", r"RUN must be a run directory, got .*; give what train.py --out wrote\."),
    ("not yaml", r"config.yaml is not YAML"),
    ("model", r"config.yaml: model must be one of .*got 'vit_none'"),
    ("other sizes", r"weights must be those of vit_28_p4 for 10 classes, .*got .*pos_embed"),
    ("other", r"model vit_s16 cuts images into 16x16 patches, got 8x8 images"),
    ("data", r"/no/such/folder"),
    ("data name", r"config.yaml: --data is 'nothing'"),
    ("step", r"--step must name a checkpoint of the run, got 5, and .* has step-4, step-8\."),
    ("m", r"m must be at most the 80 training images that are measured, got 81"),
    ("rho", r"rho must be > 0 and finite, got 0\."),
    ("count", r"iterations must be at least eigenvalues 9, got 3\."),
    ("twice", r"each RUN must be given once"),
    ("out", r"must be a directory that can be written"),
])  # fmt: skip
def test_a_mistake_is_one_sentence_with_exit_code_2(runs, capsys, how, sentence):
    flags = spoil(runs[0], how)
    assert flatness(*[runs[0]] * (1 + (how == "twice")), *QUICK, *flags) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error) and error.startswith("error: ") and error.count("\n") == 1


def test_weights_that_diverged_are_a_sentence_with_exit_code_1(runs, capsys):
    weights = load_file(runs[0] / "model.safetensors")
    weights["head.bias"][0] = float("nan")
    save_file(weights, runs[0] / "model.safetensors")
    assert flatness(runs[0], *QUICK) == 1
    assert "the training loss at the weights is not finite" in capsys.readouterr().err


def test_damaged_weights_are_a_sentence_with_exit_code_1(runs, capsys):
    (runs[0] / "model.safetensors").write_bytes(b"no weights")
    assert flatness(runs[0], *QUICK) == 1
    assert "model.safetensors cannot be read" in capsys.readouterr().err


# Groups.


def made(label: str, step=None, loss=0.1, settings=(), **config) -> dict:
    at_w = {"train": {"loss": loss, "top1": 1.0}}
    return {"label": label, "optimizer": label, "base": "adamw", "step": step, "config": config,
            "at_w": at_w, "settings": dict(settings), "data": "d", "model": "m",
            "holdout": 0}  # fmt: skip


def test_runs_that_differ_in_more_than_the_seed_are_groups_of_their_own():
    runs = [made("sam", rho=0.1, seed=0, out="a"), made("sam", rho=0.1, seed=1, out="b"),
            made("sam", rho=0.2, seed=0), made("adamw", seed=0)]  # fmt: skip
    names = [(group.name, len(group.runs)) for group in grouped(runs)]
    assert names == [("sam, rho 0.1", 2), ("sam, rho 0.2", 1), ("adamw", 1)]


def test_what_must_not_be_compared_is_named():
    assert unlike([made("sam"), made("adamw", loss=0.15)]) == []
    notes = unlike([made("sam", settings={"m": 64}), made("adamw", loss=0.3, settings={"m": 32})])
    assert [note.split(":")[0] for note in notes] == [
        "They were measured with different m",
        "Training losses at w reach from 0.1 to 0.3",
    ]
