"""A wrong setting is one sentence on stderr and exit code 2, and nothing in --out has changed."""

import errno
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dist_looksam.cli import main as cli
from dist_looksam.cli.arguments import guarded
from dist_looksam.errors import ConfigError
from dist_looksam.run.train import main
from dist_looksam.settings.config import Settings, parse
from dist_looksam.settings.flags import kind_of

ROOT = Path(__file__).parents[2]
DIGITS = ["--data", "digits", "--steps", "1"]
WRONG = {
    # name: (flags, what the sentence says)
    "optimizer": (["--optimizer", "adam"], "optimizer must be one of sgd, adamw, .*got 'adam'"),
    "base": (["--base", "adam"], "base must be one of sgd, adamw, lamb, lars.*, got 'adam'"),
    "base of a base": (["--optimizer", "lamb", "--base", "sgd"], "use --optimizer sgd"),
    "data": (["--data", "cifar10"], "--data is 'cifar10'.* use one of fashion_mnist, digits"),
    "flag": (["--batchsize", "64"], "unknown flag, got --batchsize; did you mean --batch_size"),
    "abbreviation": (["--step", "5"], "unknown flag, got --step; did you mean --steps"),
    "ranks": (["--ranks", "2"], "--ranks is what --dry_run checks for, got --ranks 2 without"),
    "word": (["64"], "unknown flag, got 64"),
    "rho": (["--rho", "-0.1"], "rho must be >= 0 and finite, got -0.1"),
    "alpha": (["--alpha", "-1"], "alpha must be >= 0 and finite, got -1.0"),
    "k": (["--k", "0"], "k must be a whole number >= 1, got 0"),
    "half k": (["--k", "2.5"], "k must be a whole number, got '?2.5"),
    "p": (["--optimizer", "sam", "--p", "1"], "p must be > 1 .*got 1.0"),
    "p per layer": (["--p", "3"], "p must be 2 with layer-wise ascent, got 3.0"),
    "lr": (["--lr", "nan"], "lr must be a number, got 'nan'"),
    "infinite lr": (["--lr", "inf"], "lr must be >= 0 and finite, got inf"),
    "negative lr": (["--lr", "-1"], "lr must be >= 0 and finite, got -1.0"),
    "word for a number": (["--weight_decay", "much"], "weight_decay must be a number, got 'much'"),
    "batch": (["--micro_batch", "3", "--batch_size", "64"], "got 64; use 63 or 66"),
    "no batch": (["--batch_size", "0"], "batch_size must be >= 1 and finite, got 0"),
    "clip": (["--clip", "0"], "clip must be > 0 and finite, got 0.0"),
    "betas": (["--betas", "0.9"], "betas must be two numbers, got"),
    "large betas": (["--betas", "0.9,1.0"], r"betas must be in \[0, 1\), got"),
    "momentum": (["--momentum", "1"], r"momentum must be in \[0, 1\), got 1.0"),
    "epochs and steps": (["--epochs", "2"], "either epochs or steps .*leave one out"),
    "schedule": (["--schedule", "step"], "schedule must be one of cosine, linear, constant"),
    "precision": (["--precision", "fp8"], "precision must be one of fp32, bf16, fp16, got 'fp8'"),
    "ascent": (["--ascent", "mine"], "ascent must be one of global, rank, got 'mine'"),
    "reuse": (["--reuse", "old"], "reuse must be one of paper, natural, got 'old'"),
    "layer_ascent": (["--layer_ascent", "sign"], "layer_ascent must be one of scaled, literal"),
    "backend": (["--backend", "mpi"], "backend must be one of auto, plain, ddp, zero, .*got 'mpi'"),
    "zero_stage": (["--zero_stage", "4"], "zero_stage must be 0, 1, 2 or 3, got 4"),
    "zero_stage of ddp": (["--backend", "ddp", "--zero_stage", "2"], "zero_stage .*backend ddp"),
    "compression": (["--compression", "fp16"], "compression fp16 is of backend horovod, got"),
    "model": (["--model", "vit_x"], "model must be one of auto, .*got 'vit_x'"),
    "model's patch": (["--model", "vit_b16"], "16x16 patches, got 8x8 images"),
    "augment": (["--augment", "crop,blur"], "--augment knows no 'blur'"),
    "augment's number": (["--augment", "mixup:x"], "--augment mixup takes a number"),
    "odd pairs": (["--augment", "mixup", "--batch_size", "9"], "micro_batch must be even"),
    "drop_path": (["--drop_path", "1"], r"drop_path must be in \[0, 1\), got 1.0"),
    "no folder named": (["--data", "folder"], "--data folder needs --data_dir, got none"),
    "no such folder": (["--data", "folder", "--data_dir", "/no/such"], "/no/such"),
    "digits in a folder": (["--data_dir", "/tmp"], "--data digits takes no --data_dir"),
    "fashion elsewhere": (["--data", "fashion_mnist", "--data_dir", "/no/such"], "/no/such/train-"),
    "no checkpoint": (["--resume", "/no/such"], "resume must be auto, none or a .*got /no/such"),
    "no config": (["--config", "/no/such.yaml"], "config must be a YAML file, got '/no/such.yaml'"),
}  # fmt: skip


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture
def out(tmp_path):
    """A run directory that holds an older run."""
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("seed: 7\n")
    (tmp_path / "runs" / "mine" / "metrics.jsonl").write_text('{"step": 0}\n')
    return tmp_path / "runs" / "mine"


def refused(flags: list[str], out: Path, capfd) -> str:
    """The sentence that main says; everything else about a refusal is asserted here."""
    before = tree(out.parent)
    assert main([*DIGITS, "--out", str(out), *flags]) == 2
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ") and told.err.endswith("\n")
    assert told.err.count("\n") == 1, told.err
    assert tree(out.parent) == before
    return told.err


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_flag_is_one_sentence_and_changes_nothing(name, out, capfd):
    flags, says = WRONG[name]
    sentence = refused(flags, out, capfd)
    assert re.search(says, sentence), sentence


NUMBERS = [f.name for f in fields(Settings) if kind_of(f) in (int, float)]
ABSURD = ["1e400", "-1e400", "nan", "-1", "0", str(10**30), "1e300", "1e9", str(2**64), "9" * 5000]


@pytest.mark.parametrize("name", NUMBERS)
def test_an_absurd_number_is_refused_or_trains_but_is_no_traceback(name, tmp_path, capfd):
    """--seed 2**64 ended in a traceback of torch, and 2**53 + 1 was another seed than asked for."""
    flags = ["--data", "digits", "--model", "vit_8", "--batch_size", "8", "--device", "cpu"]
    flags += [] if name in ("steps", "epochs") else ["--steps", "1"]
    for text in ABSURD:
        mine = [*flags, f"--{name}", text, "--out", str(tmp_path / "run")]
        try:
            parse(mine).resolved(ranks=1, launcher="single", samples=1437)
        except ConfigError as error:
            assert "\n" not in str(error)
        kind = kind_of(Settings.__dataclass_fields__[name])
        if kind is float and text != "0":
            code = main(mine)
            error = capfd.readouterr().err
            assert code in (0, 1, 2) and error.count("\n") == (code != 0), (text, error)


def test_whole_numbers_are_taken_exactly(capsys):
    assert parse(["--seed", str(2**53 + 1)]).seed == 2**53 + 1
    assert parse(["--steps", "1e6"]).steps == 10**6


@pytest.mark.parametrize("text, says", [
    ("optimiser: sgd\n", "config has an unknown setting, got optimiser; did you mean optimizer?"),
    ("k: many\n", "k must be a whole number, got 'many'"),
    ("rho: 0.01\nk:\n", "k must have a value, got none; the default is 5"),
    ("seed: true\n", "seed must be a whole number, got True"),
    ("rho: [1, 2]\n", "rho must be a number, got [1, 2]"),
    ("betas: 0.9\n", "betas must be two numbers, got [0.9]"),
    ("augment: [crop, flip]\n", "augment must be a text, got ['crop', 'flip']"),
    ("offload: maybe\n", "must be true or false, got 'maybe'"),
    ("k: 5\n  rho: 1\n bad", "config must be YAML with lines like"),
    ("just words\n", "config must be YAML with lines like"),
])  # fmt: skip
def test_a_wrong_yaml_file_is_one_sentence(text, says, out, tmp_path, capfd):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert says in refused(["--config", str(path)], out, capfd)


def test_a_class_without_images_is_named(out, tmp_path, capfd):
    for split in ("train", "val"):
        for name in ("cats", "dogs"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
    sentence = refused(["--data", "folder", "--data_dir", str(tmp_path / "images")], out, capfd)
    assert str(tmp_path / "images") in sentence


def test_an_out_that_cannot_be_made_is_one_sentence(tmp_path, capfd):
    (tmp_path / "file").write_text("in the way")
    before = tree(tmp_path)
    assert main([*DIGITS, "--out", str(tmp_path / "file" / "run")]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "out must be a directory that can be written" in told
    assert tree(tmp_path) == before


def test_a_damaged_checkpoint_is_one_sentence(out, capfd):
    step = out / "checkpoints" / "step-3"
    step.mkdir()
    (step / "manifest.json").write_text("{")
    before = tree(out)
    assert main([*DIGITS, "--out", str(out), "--resume", "auto"]) == 1
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "manifest.json is damaged" in told
    assert tree(out) == before


@pytest.mark.parametrize("argv, says", [
    (["trian"], "got 'trian'; did you mean train?"),
    (["curves"], "RUN; see dist-looksam curves --help"),
    (["curves", "/no/such"], "got /no/such"),
    (["probe", "/no/such"], "probe.jsonl must hold at least two looks"),
    (["bench", "--optimizers", "adam"], "optimizer must be one of"),
    (["bench", "--repeats", "0"], "repeats must be between 1 and"),
    (["bench", "--batch_size", "10", "--micro_batch", "3"], "whole number, got 10"),
    (["bench", "--speed", "3"], "unrecognized arguments: --speed 3"),
    (["train", "--k", "0"], "k must be a whole number >= 1"),
    (["world", "--megabytes", "x"], "invalid float value"),
])  # fmt: skip
def test_every_command_of_the_console_script_refuses_in_one_sentence(argv, says, capfd):
    assert cli.main(argv) == 2
    told = capfd.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and says in told, told


@pytest.mark.parametrize("command", [
    ["cost", "--optimizer", "sam", "--json"],
    ["curves", "DIR", "DIR", "--out"],
    ["checkpoint", "export", "DIR/checkpoints/step-3"],
    ["plan", "--calibrate"],
    ["watch", "DIR", "--export"],
], ids=lambda words: words[0])  # fmt: skip
@pytest.mark.parametrize("name", ["no/x.png", "."])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(command, name, out, capfd):
    words = [word.replace("DIR", str(out)) for word in command]
    before = tree(out)
    assert cli.main([*words, str(out / name)]) == 2
    told = capfd.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert "must be a file in a directory that can be written" in told
    assert tree(out) == before


def test_the_program_itself_leaves_with_2_and_no_traceback(tmp_path):
    """As a user sees it: train.py as a process."""
    command = [sys.executable, str(ROOT / "train.py"), "--k", "0", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: k must be a whole number >= 1, got 0. 1 looks every step.\n"
    assert not (tmp_path / "out").exists()


def test_only_the_first_rank_speaks(tmp_path, capfd, monkeypatch):
    """All ranks once spoke about a flag that is wrong before their numbers are known."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    told = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        for flags in (["--k", "0"], ["--data", "cifar10"]):
            assert main([*flags, "--out", str(tmp_path)]) == 2
        told.append(capfd.readouterr().err.count("\n"))
    assert told == [2, 0]


def test_the_tests_run_outside_any_launcher():
    assert "RANK" not in os.environ


def test_the_tests_compute_on_as_many_threads_as_conftest_says():
    """torch was there before the variable, if not: passes then take 80 times as long."""
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def test_cost_has_its_own_help_and_misses_the_name_of_its_file_in_a_sentence(capsys):
    """It showed train.py's help, and ended in a traceback."""
    assert cli.main(["cost", "--json"]) == 2
    assert capsys.readouterr().err.startswith("error: argument --json: expected one argument")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["cost", "--help"])
    assert "cost [--json FILE] FLAGS_OF_TRAIN" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "said"), [
    (PermissionError(errno.EACCES, "Permission denied", "runs/a"), "Permission denied (runs/a)"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
])  # fmt: skip
def test_a_folder_of_others_and_a_full_disk_are_one_sentence(error, said, capsys):
    """Tracebacks. Of train they are kept: they tell which part of a run met it."""

    def command(argv):
        raise error

    assert guarded(command, ["jobs"]) == 1
    assert capsys.readouterr().err == f"error: {said}\n"
    with pytest.raises(OSError):
        guarded(command, ["train"])
    error.errno, error.filename = errno.ECONNREFUSED, None
    with pytest.raises(OSError):
        guarded(command, ["jobs"])
