"""Run directories that hold what is not this run's, and files that are not what they should be."""

import json
from pathlib import Path

import pytest
import torch

from dist_looksam.cli.main import main
from dist_looksam.data.augment import Augment
from dist_looksam.data.folder import folder
from dist_looksam.errors import ConfigError, RunError
from dist_looksam.record import jobs, rundir
from dist_looksam.record.progress import Progress
from dist_looksam.report import runs
from dist_looksam.run import results
from dist_looksam.run.advice import without_effect
from dist_looksam.run.train import main as train
from dist_looksam.settings.config import Settings, parse

FOREIGN = {
    "config.yaml": ["just a text", "- 1", "{broken", "steps: many", "\x00"],
    "job.json": ["[1]", "5", "null", '"x"', '{"hosts": 5}', '{"slurm_restarts": [1]}'],
    ".lock": ["[1]", '{"host": 3}'],
    "metrics.jsonl": ["[1]\n5\n", '{"step": "zero"}\n{"x": 1}\n', '{"loss": 1}\n{"loss": 2}\n'],
}


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/step-9", "checkpoints/step-1/new"])
def test_a_run_among_the_checkpoints_of_another_is_refused(inside, tmp_path):
    """`--out A/checkpoints/step-9` was later taken for a checkpoint of A that is not complete."""
    (tmp_path / "a" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "a" / "config.yaml").write_text("steps: 9\n")
    with pytest.raises(ConfigError, match="out must not be among the checkpoints of a run, got"):
        rundir.check_place(tmp_path / "a" / inside)
    rundir.check_place(tmp_path / "a" / "checkpoint-free")


@pytest.mark.parametrize("name", ["model.safetensors", "summary.json", "metrics.jsonl"])
def test_files_of_another_program_are_moved_aside_and_not_written_over(name, tmp_path):
    """`--out` on a folder of pretrained weights wrote over its model.safetensors: only a folder
    with a config.yaml was taken for a used one."""
    out = tmp_path / "pretrained"
    out.mkdir()
    (out / name).write_text("precious")
    [note] = rundir.prepare(out, resume_step=None)
    rundir.release(out)
    assert (tmp_path / "pretrained.1" / name).read_text() == "precious"
    assert "pretrained.1" in note and not (out / name).exists()


def test_checkpoints_without_a_config_are_not_those_of_a_fresh_run(tmp_path):
    """The next --resume auto would have gone on from them."""
    (tmp_path / "a" / "checkpoints" / "step-99").mkdir(parents=True)
    rundir.prepare(tmp_path / "a", resume_step=None)
    rundir.release(tmp_path / "a")
    assert not (tmp_path / "a" / "checkpoints" / "step-99").exists()


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints" / "step-2").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("steps: 4\n")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n')
    return tmp_path / "a", tmp_path / "b"


def test_a_run_that_goes_on_from_another_run_does_not_take_the_lines_of_a_third(two):
    """`--resume A/checkpoints/step-2 --out B` kept steps 0 and 1 of the run that was in B before
    the lines of the new one: one curve of two runs, without a word."""
    a, b = two
    [note] = rundir.prepare(b, resume_step=2, resumed=a / "checkpoints" / "step-2")
    rundir.release(b)
    assert f"{b}.1" in note and not (b / "metrics.jsonl").exists()
    assert (b.parent / "b.1" / "metrics.jsonl").exists()
    assert (a / "checkpoints" / "step-2").exists()


def test_a_run_that_goes_on_from_its_own_checkpoint_stays_where_it_is(two):
    a, _ = two
    assert rundir.prepare(a, resume_step=2, resumed=a / "checkpoints" / "step-2") == []
    rundir.release(a)
    assert (a / "metrics.jsonl").exists()


def test_a_link_as_out_keeps_its_target(two, tmp_path):
    """The link was renamed, and the new run was written on the disk of the link."""
    a, _ = two
    link = tmp_path / "link"
    link.symlink_to(a)
    rundir.prepare(link, resume_step=None)
    rundir.release(link)
    assert link.is_symlink() and link.resolve() == a
    assert (tmp_path / "a.1" / "config.yaml").exists() and not (a / "config.yaml").exists()


@pytest.mark.parametrize("out", ["", "a\0b"])
def test_out_must_name_a_directory(out):
    """`--out "$UNSET"` trained into the current directory."""
    with pytest.raises(ConfigError, match="out must name a directory"):
        Settings(out=out)


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, ts in FOREIGN.items() for t in ts])
def test_a_damaged_or_foreign_file_costs_jobs_and_reports_one_row(name, text, two, capsys):
    """One such file in any folder ended `jobs` and `report` for all runs in a traceback."""
    a, b = two
    (a / name).write_text(text)
    rows = jobs.table(a.parent)
    assert {row["run"] for row in rows} == {str(a), str(b)}
    (a.parent / "c").mkdir()
    (a.parent / "c" / "config.yaml").write_text("optimizer: sgd\nbatch_size: 8\nseed: 0\n")
    assert str(a.parent / "c") in {run.folder for run in runs.find([str(a.parent)]).runs}
    assert main(["cancel", str(a)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_at_the_last_file_is_one_sentence(tmp_path):
    """safetensors raises an error of its own, which is no OSError: a traceback."""
    with pytest.raises(RunError, match=r"model.safetensors was not written: .*checkpoint export"):
        results._write_weights({"a": torch.zeros(1)}, tmp_path / "gone" / "model.safetensors", {})


@pytest.mark.parametrize("text", ["rho: 0.1\nrho: 0.2\n", "seed: 1\n'seed': 2\n"])
def test_a_config_that_names_a_setting_twice_is_refused(text, tmp_path):
    """The later line won without a word."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"is there twice.*line 2"):
        parse(["--config", str(tmp_path / "c.yaml")])


def test_a_sweep_that_names_a_method_twice_is_refused(tmp_path, capsys):
    text = "methods:\n  sgd: {}\n  sgd: {lr: 1.0}\nbatch_sizes: [16]\nseeds: [0]\n"
    (tmp_path / "s.yaml").write_text(text)
    assert main(["sweep", str(tmp_path / "s.yaml"), "--dry_run"]) == 2
    assert "sgd is there twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"optimizer": "sgd", "eps": 1e-3}, "--eps: no effect with optimizer sgd on sgd"),
        ({"optimizer": "sgd", "probe_every": 1}, "--probe_every: no effect with optimizer sgd"),
        ({"lr_base_batch": 64}, "--lr_base_batch: no effect with lr_scaling none"),
        ({"image_size": 64, "data": "digits"}, "--image_size: no effect with data digits"),
    ],
)
def test_a_setting_that_another_one_switches_off_is_told(flags, says):
    """They were taken without a word."""
    given = Settings(**flags).for_ranks(ranks=1, launcher="none")
    assert says in "; ".join(without_effect(given))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "look_layer_sam"])
def test_defaults_are_not_told(optimizer):
    assert without_effect(Settings(optimizer=optimizer).for_ranks(ranks=1, launcher="none")) == []


def test_a_name_that_the_terminal_or_utf_8_cannot_say_ends_no_run(tmp_path, monkeypatch):
    """A damaged image whose name is not UTF-8 ended the training in a UnicodeEncodeError, from the
    warning about it; so did an accent where the output is ASCII."""
    with (tmp_path / "out").open("w", encoding="ascii") as said, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", said)
        with Progress(1, shown=True, log=tmp_path / "log.txt") as progress:
            progress.note("cannot read \udcff.png of caf\u00e9")
    assert "\\udcff.png of caf\\xe9" in (tmp_path / "out").read_text()
    assert "\\udcff.png of caf\u00e9" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_curves_of_another_program_s_lines_are_one_sentence(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2}\n')
    assert main(["curves", str(tmp_path)]) == 1
    assert "are not of this program" in capsys.readouterr().err


def test_a_tree_with_one_class_is_refused(tmp_path):
    """train/images/*.jpg, not yet sorted into classes, gave 100 % after the first step."""
    for split in ("train", "val"):
        (tmp_path / split / "images").mkdir(parents=True)
        (tmp_path / split / "images" / "0.jpg").write_text("x")
    with pytest.raises(ConfigError, match="must hold two class folders or more, got only 'images'"):
        folder(tmp_path, image_size=16, augment=Augment(), seed=0)


def test_a_resume_at_the_last_step_into_another_directory_ends_well(tmp_path):
    """There was no step to draw: it ended in an error after the weights, without a summary."""
    flags = ["--data", "digits", "--model", "vit_8", "--batch_size", "16", "--device", "cpu"]
    assert train([*flags, "--steps", "2", "--out", str(tmp_path / "a")]) == 0
    step = str(tmp_path / "a" / "checkpoints" / "step-2")
    again = [*flags, "--steps", "2", "--resume", step, "--out", str(tmp_path / "b")]
    assert train(again) == 0
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["steps"] == 2
