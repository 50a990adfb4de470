"""train.py with looks in a window, adaptive looks and schedules of rho: files, dry run, resume."""

import contextlib
import io
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from dist_looksam.maths.schedule import factor, rho_factor
from dist_looksam.plan import plan
from dist_looksam.record import metrics
from dist_looksam.run import dryrun
from dist_looksam.run.train import main
from dist_looksam.settings.config import parse

STEPS = 20
BASE = ["--data", "digits", "--batch_size", "32", "--steps", str(STEPS), "--eval_every", "1000"]
BASE += ["--k", "3"]


def train(out, *flags, steps=STEPS):
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*BASE, *flags, "--steps", str(steps), "--out", str(out)]) == 0
    lines, _ = metrics.read(out / "metrics.jsonl")
    return lines, json.loads((out / "summary.json").read_text())


def outcome(*flags):
    return dryrun.check(parse([*BASE, *flags]), ranks=1)


def looks(lines):
    return [line["step"] for line in lines if line["look"]]


RUNS = {
    "late": (["--optimizer", "look_sam", "--look_from", "0.7"], range(14, 20, 3)),
    "late, every step": (["--optimizer", "sam", "--look_from", "0.9"], range(18, 20)),
    "early": (["--optimizer", "look_layer_sam", "--look_until", "8"], range(0, 8, 3)),
    "from step 1": (["--optimizer", "look_sam", "--look_from", "1"], range(1, 20, 3)),
    "of one step": (["--optimizer", "sam_k", "--look_until", "1"], range(1)),
    "whole": (["--optimizer", "sam_k", "--look_from", "0", "--look_until", "1.0"], range(0, 20, 3)),
    "none": (["--optimizer", "adamw", "--look_from", "0.5"], range(0)),
}


@pytest.mark.parametrize("case", RUNS)
def test_dry_run_summary_and_plan_count_the_looks_that_happen(case, tmp_path):
    flags, steps = RUNS[case]
    lines, summary = train(tmp_path / "run", *flags)
    assert looks(lines) == list(steps)
    found = outcome(*flags)
    assert found.passes == summary["forward_backward_passes"] == STEPS + len(steps)
    planned = plan(parse([*BASE, *flags]), gpus=1, machine="h100")
    one = planned.times["base"].compute
    assert planned.times["mean"].compute == pytest.approx(one * found.passes / STEPS)
    text = dryrun.summary(found)
    if steps:
        assert f"{len(steps):,}" in text and f"step {steps[-1]}" in text
        assert f"passes      {found.passes}, {len(steps)} of them for looks" in text
    if "look_" in flags[1]:
        reused = range(steps[0], 8 if case == "early" else STEPS)
        assert [line["step"] for line in lines if line["gv_norm"]] == list(reused)


def test_late_looks_in_every_step_cost_a_tenth(tmp_path):
    flags = ["--optimizer", "look_sam", "--look_from", "0.9", "--k", "1"]
    _, summary = train(tmp_path / "run", *flags)
    assert summary["forward_backward_passes"] == outcome(*flags).passes == 1.1 * STEPS


ADAPTIVE = ["--looks", "adaptive"]


@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("name", ["look_sam", "sam_k"])
def test_the_share_of_adaptive_looks_is_one_in_k(name, k, tmp_path):
    """Within 5 % of it after 240 steps, and not periodic."""
    flags = ["--optimizer", name, *ADAPTIVE, "--k", str(k), "--model", "vit_8"]
    lines, summary = train(tmp_path / "run", *flags, steps=240)
    at = looks(lines)
    assert len(at) == pytest.approx(240 / k, rel=0.05, abs=1.5)
    assert summary["forward_backward_passes"] == 240 + len(at)
    assert len({b - a for a, b in itertools.pairwise(at)}) > 2
    text = dryrun.summary(outcome(*flags))
    assert "adaptive, between step 0 and step 19" in text and "passes      about 2" in text


SCHEDULES = {
    "constant": ([], lambda t, lr: 1.0),
    "lr": (["--rho_schedule", "lr"], lambda t, lr: lr),
    "gsam": (["--rho_schedule", "lr", "--rho_end", "0.25"], lambda t, lr: 0.25 + 0.75 * lr),
    "linear": (
        ["--rho_schedule", "linear", "--rho_end", "3", "--look_from", "0.5"],
        lambda t, lr: 1 + 2 * (t - 10) / 10,
    ),
    "cosine": (
        ["--rho_schedule", "cosine"],
        lambda t, lr: (1 + math.cos(math.pi * t / STEPS)) / 2,
    ),
    "warm-up": (
        ["--rho_warmup_steps", "4", "--look_from", "6"],
        lambda t, lr: min(1.0, (t - 5) / 4),
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rho_of_each_look_is_that_of_the_schedule(schedule, tmp_path):
    flags, of = SCHEDULES[schedule]
    lines, _ = train(tmp_path / "run", "--optimizer", "sam_k", "--rho", "0.04", *flags)
    for line in lines:
        lr = factor(line["step"], steps=STEPS, warmup=1, schedule="cosine")
        expected = 0.04 * of(line["step"], lr) if line["look"] else None
        assert line["rho"] == (expected if expected is None else pytest.approx(expected, rel=1e-7))


def test_a_factor_of_zero_is_the_base_and_another_is_not(tmp_path):
    """What is logged is also what perturbs."""
    runs = {}
    for name, flags in {"rho 0": ["--rho", "0"], "linear": [], "none": []}.items():
        schedule = [] if name == "none" else ["--rho_schedule", "linear"]
        train(tmp_path / name, "--optimizer", "sam", "--base", "sgd", *flags, *schedule)
        runs[name] = load_file(tmp_path / name / "model.safetensors")
    base = tmp_path / "base"
    train(base, "--optimizer", "sgd", "--lr", "0.1")
    same = {n: all(map(torch.equal, runs["none"].values(), w.values())) for n, w in runs.items()}
    assert same == {"rho 0": False, "linear": False, "none": True}


def test_a_schedule_ends_where_it_says():
    how = dict(first=100, steps=200, warmup=0, end=2.5, lr=0.0)
    for schedule in ("linear", "cosine"):
        assert rho_factor(100, schedule=schedule, **how) == 1.0
        assert rho_factor(200, schedule=schedule, **how) == pytest.approx(2.5)
        assert rho_factor(50, schedule=schedule, **how) == 1.0
        assert 1.7 < rho_factor(150, schedule=schedule, **how) < 1.8
    assert rho_factor(0, schedule="lr", **how) == 2.5


RESUMES = {
    "window": ["--look_from", "4", "--look_until", "13"],
    "adaptive": ADAPTIVE,
    "adaptive in a window": [*ADAPTIVE, "--look_from", "0.2", "--look_until", "0.8"],
    "rho": ["--rho_schedule", "cosine", "--rho_end", "2", "--rho_warmup_steps", "5"],
}


@pytest.mark.parametrize("how", RESUMES)
@pytest.mark.parametrize("name", ["look_layer_sam", "sam_k"])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(name, how, tmp_path):
    """From before the window, between two looks, and after it."""
    flags = ["--optimizer", name, *RESUMES[how], "--save_every", "1"]
    whole, _ = train(tmp_path / "whole", *flags)
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    for step in (1, 6, 7, 15):
        again = tmp_path / f"from-{step}"
        resume = ["--resume", str(tmp_path / "whole" / "checkpoints" / f"step-{step}")]
        lines, summary = train(again, *flags, *resume)
        mine = load_file(again / "model.safetensors")
        assert all(torch.equal(mine[n], weights[n]) for n in weights), f"from step {step}"
        assert looks(lines) == [t for t in looks(whole) if t >= step]
        assert summary["forward_backward_passes"] == STEPS + len(looks(whole))


WRONG = {
    "one moment": (["--look_from", "0.5", "--look_until", "0.5"], "look_from must be before"),
    "turned round": (["--look_from", "0.9", "--look_until", "10"], "got step 18 and step 10"),
    "after the end": (["--look_from", "20"], "the end of the run's 20 steps, got step 20"),
    "at the end": (["--look_from", "1.0"], "between which no step can look"),
    "too large a share": (["--look_from", "1.5"], "look_from must be a share of the run"),
    "negative": (["--look_until", "-1"], "look_until must be a whole number of steps >= 0"),
    "a word": (["--look_from", "late"], "look_from must be a share of the run"),
    "not a number": (["--look_from", "nan"], "look_from must be a share of the run"),
    "adaptive without k": (["--optimizer", "sam", *ADAPTIVE], "needs a method that has k, got"),
    "adaptive at k 1": ([*ADAPTIVE, "--k", "1"], "k must be >= 2 with looks adaptive, got 1"),
    "end without schedule": (["--rho_end", "2"], "rho_end needs a schedule that ends there"),
    "long warm-up": (["--look_from", "15", "--rho_warmup_steps", "5"], "must be fewer than the 5"),
    "negative end": (["--rho_schedule", "lr", "--rho_end", "-1"], "rho_end must be >= 0"),
    "schedule": (["--rho_schedule", "step"], "rho_schedule must be one of constant, lr, linear"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_contradiction_is_one_sentence(case, tmp_path, capsys):
    flags, sentence = WRONG[case]
    assert main([*BASE, *flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text, step", [
    ("0", 0), ("0.0", 0), ("1", 1), ("7", 7), ("0.5", 10), ("1e1", 10), ("0.26", 5),
])  # fmt: skip
def test_a_decimal_point_makes_a_share_and_the_file_of_the_run_has_the_step(text, step, tmp_path):
    found = parse([*BASE, "--look_from", text]).resolved(ranks=1, launcher="", samples=1000)
    assert found.look_from == step and found.rule.look_from == step
    path = tmp_path / "config.yaml"
    path.write_text(f"look_from: {text}\nlook_until: 1.0\n")
    from_file = parse([*BASE, "--config", str(path)])
    assert from_file.resolved(ranks=1, launcher="", samples=1000).look_from == step
    path.write_text(from_file.to_yaml())
    assert parse(["--config", str(path)]) == from_file
