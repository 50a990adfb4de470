"""--extend: a run is made longer without a jump of the learning rate, and resumes exactly."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from dist_looksam.cli.main import main
from dist_looksam.record import rundir

FLAGS = ["train", "--data", "digits", "--device", "cpu", "--workers", "0", "--optimizer"]
FLAGS += ["look_sam", "--k", "3", "--batch_size", "16", "--warmup_steps", "2", "--save_every", "4"]


def train(out, *flags, code=0):
    assert main([*FLAGS, "--out", str(out), *map(str, flags)]) == code
    return out


def rates(out):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["lr"] for row in rows if "lr" in row}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """8 steps of a cosine, with checkpoints after 4 and 8."""
    return train(tmp_path_factory.mktemp("extend") / "run", "--steps", 8)


def test_lr_goes_on_at_its_value_and_falls_to_the_new_end_and_a_resume_is_exact(first, tmp_path):
    middle = first / "checkpoints" / "step-4"
    how = ("--steps", 16, "--extend")
    out = train(tmp_path / "out", *how, "--resume", middle)
    old, got = rates(first), rates(out)
    assert got[4] == pytest.approx(old[4], rel=1e-6)
    for step in range(4, 16):
        want = old[4] * (1 + math.cos(math.pi * (step - 4) / 12)) / 2
        assert got[step] == pytest.approx(want, rel=1e-6), step
    log = (out / "log.txt").read_text()
    assert "extended from 8 to 16 steps: from step 4 on lr falls (cosine) to 0, from 75.0%" in log

    again = train(tmp_path / "again", *how, "--resume", out / "checkpoints" / "step-12")
    without = train(
        tmp_path / "without", "--steps", 16, "--resume", out / "checkpoints" / "step-12"
    )
    for other in (again, without):
        assert {s: lr for s, lr in got.items() if s >= 12} == rates(other)
        want, have = (load_file(folder / "model.safetensors") for folder in (out, other))
        assert all(torch.equal(have[n], want[n]) for n in want)


def test_an_extended_run_can_be_extended_again_and_without_the_flag_begins_anew(first, tmp_path):
    middle = first / "checkpoints" / "step-4"
    out = train(tmp_path / "out", "--steps", 12, "--extend", "--resume", middle)
    last = out / "checkpoints" / "step-8"
    more = train(tmp_path / "more", "--steps", 24, "--extend", "--resume", last)
    assert rates(more)[8] == pytest.approx(rates(out)[8], rel=1e-6)
    peak = rates(first)[1]  # the last step of the warm-up
    anew = train(tmp_path / "anew", "--steps", 10, "--resume", last)
    assert rates(anew)[8] == pytest.approx(peak * (1 + math.cos(math.pi * 6 / 8)) / 2, rel=1e-6)
    assert "--extend goes on at that" in (anew / "log.txt").read_text()


def test_rho_and_shares_of_the_run_follow_the_longer_run_and_the_log_says_so(tmp_path):
    """rho jumped from half of its start to three quarters without a word."""
    how = ("--rho_schedule", "linear", "--look_from", "0.0", "--augment", "mixup", "--mixup_until")
    out = train(tmp_path / "run", "--steps", 8, *how, "0.5")
    middle = out / "checkpoints" / "step-4"
    longer = train(tmp_path / "out", "--steps", 16, "--extend", *how, "0.5", "--resume", middle)
    log = (longer / "log.txt").read_text()
    assert "rho is that of 16 steps: at step 4 its factor is 0.75, where that of 8 steps" in log
    assert "mixup_until is 8, was 4 when" in log and "extended from 8 to 16 steps" in log
    rows = map(json.loads, (longer / "metrics.jsonl").read_text().splitlines())
    rho = {row["step"]: row["rho"] for row in rows if row.get("rho") is not None}
    assert rho[6] == pytest.approx(0.02 * (1 - 6 / 16))


def test_a_dry_run_says_it(first, capsys):
    flags = ["--steps", "16", "--extend", "--resume", str(first / "checkpoints" / "step-4")]
    assert main([*FLAGS, *flags, "--dry_run"]) == 0
    assert "note: extended from 8 to 16 steps: from step 4 on" in capsys.readouterr().out


@pytest.mark.parametrize("flags, said", [
    (["--steps", "16"], "extend makes a run longer, got no --resume"),
    (["--steps", "16", "--resume", "auto"], "extend needs a checkpoint to go on from, got none in"),
    (["--steps", "8", "--resume", "MIDDLE"], "extend needs more steps than the 8 of the run"),
    (["--steps", "16", "--resume", "RUN"], "at least 1% of its peak, got 0.00% in .*step-8"),
])  # fmt: skip
def test_what_cannot_be_extended_is_one_sentence(first, tmp_path, capsys, flags, said):
    named = {"RUN": str(first), "MIDDLE": str(first / "checkpoints" / "step-4")}
    train(tmp_path / "out", "--extend", *(named.get(flag, flag) for flag in flags), code=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(said, error), error


def test_a_requeued_job_goes_on_from_its_own_checkpoints_and_not_from_the_path_again(
    first, tmp_path, monkeypatch
):
    """SLURM starts it with the flags that it had, so it began at step 4 after each time limit."""
    middle = str(first / "checkpoints" / "step-4")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    out = train(tmp_path / "out", "--steps", 12, "--extend", "--resume", middle)
    names = [p.name for p in rundir.to_resume(out, middle)]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = [p.name for p in rundir.to_resume(out, middle)]
    assert names == ["step-4"] and again == ["step-12", "step-8"]
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert [p.name for p in rundir.to_resume(out, middle)] == ["step-4"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert [p.name for p in rundir.to_resume(tmp_path / "other", middle)] == ["step-4"]
