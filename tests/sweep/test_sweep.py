"""dist-looksam sweep: every point once, tuned alike, and the same table after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dist_looksam.errors import ConfigError
from dist_looksam.settings.config import parse
from dist_looksam.sweep import array, grid
from dist_looksam.sweep.ledger import Ledger

pytestmark = pytest.mark.slow

SWEEP = {
    "settings": {
        "data": "digits", "model": "vit_8", "steps": 4, "device": "cpu", "augment": "none",
        "lr_scaling": "sqrt", "lr_base_batch": 32, "workers": 0,
    },
    "batch_size": [32, 64],
    "seeds": [0, 1],
    "tune": {"batch_size": [32], "seed": 9, "holdout": 300},
    "methods": {
        "adamw": {"tune": {"lr": [1e-6, 0.005]}},
        "look_sam": {"k": 2, "tune": {"lr": [0.005], "rho": [0.01, 0.02]}},
    },
}  # fmt: skip
POINTS = 2 * 2 + 2 * 2 * 2


def written(folder: Path, sweep: dict = SWEEP, **changed) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**sweep, **changed}))
    return path


def command(file: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "dist_looksam.cli.main", "sweep", str(file), *more]


def run(file: Path, *more: str, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command(file, *more), capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def trials(sweep: grid.Grid) -> list[grid.Point]:
    return [t for b in sweep.tuned_at for label in sweep.methods for t in sweep.trials(label, b)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The sweep, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    told = run(written(folder), "--out", str(folder / "out"), "--jobs", "2")
    assert f"[{POINTS}/{POINTS}]" in told.stdout
    return folder / "out"


def test_a_trial_that_learns_nothing_is_scored_and_the_sweep_goes_on(tmp_path):
    """Its run exits with 1. Counted as failed, it would keep the sweep from ever choosing."""
    methods = {"look_sam": {"tune": {"rho": [1e9, 0.01]}}}
    file = written(tmp_path, batch_size=[32], seeds=[0], methods=methods)
    told = run(file, "--out", str(tmp_path / "out"))
    assert "[3/3]" in told.stdout and "(exit 1, see " in told.stdout


def test_a_sweep_killed_half_way_goes_on_and_ends_with_the_same_table(whole, tmp_path):
    """By SIGKILL, which nobody can catch: the runs under way must end with it, too."""
    file, out = written(tmp_path), tmp_path / "out"
    words = ("--out", str(out), "--jobs", "2")
    first = subprocess.Popen(command(file, *words), stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 300
        while len(list(out.glob("*/*/summary.json"))) < POINTS // 2:
            assert time.monotonic() < end and first.poll() is None
            time.sleep(0.05)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    end = time.monotonic() + 60
    while any(str(out).encode() in line for line in command_lines()):
        assert time.monotonic() < end, "a point outlived its sweep"
        time.sleep(0.1)
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*/summary.json")}
    assert POINTS // 2 <= len(before) < POINTS
    told = run(file, *words)
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())  # not run again
    assert f"{len(before)} done before" in told.stdout
    assert (out / "table.md").read_text() == (whole / "table.md").read_text()
    assert (out / "choices.json").read_text() == (whole / "choices.json").read_text()


def command_lines() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return found


def test_trials_choose_on_held_out_images_and_finals_train_on_all_of_them(whole):
    chosen = json.loads((whole / "choices.json").read_text())["adamw"]["32"]
    scores = {}
    for lr in (1e-6, 0.005):
        run_dir = whole / f"tune/adamw-b32-s9-lr{lr:g}"
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        assert config["holdout"] == 300 and config["seed"] == 9
        scores[lr] = json.loads((run_dir / "summary.json").read_text())["top1"]
    best = max(scores, key=lambda lr: (scores[lr], -lr))
    assert chosen == {"lr": best, "trials": 2, "score": scores[best]}
    for size in (32, 64):  # at 64 nothing is tried: the nearest choice, its lr by the square root
        final = whole / f"final/adamw-b{size}-s1"
        config = yaml.safe_load((final / "config.yaml").read_text())
        assert config["lr"] == best and config["holdout"] == 0
        rows = map(json.loads, (final / "metrics.jsonl").read_text().splitlines())
        peak = max(row["lr"] for row in rows if "lr" in row)
        assert peak == pytest.approx(best * (size / 32) ** 0.5)
        point = json.loads((final / "point.json").read_text())
        assert point["stage"] == "final" and point["label"] == "adamw" and point["seed"] == 1


def test_the_table_is_the_mean_over_seeds(whole):
    top1 = [
        json.loads((whole / f"final/look_sam-b64-s{seed}/summary.json").read_text())["top1"]
        for seed in (0, 1)
    ]
    mean = 100 * sum(top1) / 2
    spread = 100 * abs(top1[0] - top1[1]) / 2**0.5
    line = next(t for t in (whole / "table.md").read_text().splitlines() if "look_sam" in t)
    assert line.endswith(f"{mean:.2f} ± {spread:.2f} (2) |")


def test_a_point_of_other_settings_is_run_anew_and_the_old_one_kept(whole, tmp_path):
    out = tmp_path / "out"
    one = {"methods": {"adamw": {}}, "batch_size": [32], "seeds": [0], "tune": None}
    run(written(tmp_path, **one), "--out", str(out))
    longer = {"settings": {**SWEEP["settings"], "steps": 5}}
    told = run(written(tmp_path, **one, **longer), "--out", str(out))
    assert "final/adamw-b32-s0 was of other settings" in told.stdout
    steps = [
        json.loads((out / name / "summary.json").read_text())["steps"]
        for name in ("final/adamw-b32-s0", "superseded/final/adamw-b32-s0.0")
    ]
    assert steps == [5, 4]


def test_a_point_that_fails_is_named_and_the_others_are_run(tmp_path):
    """data_dir is known to be wrong only when the run opens it."""
    out = tmp_path / "out"
    bad = {"adamw": {}, "sgd": {"data": "fashion_mnist", "data_dir": str(tmp_path / "none")}}
    one = {"methods": bad, "batch_size": [32], "seeds": [0], "tune": None}
    told = run(written(tmp_path, **one), "--out", str(out), code=1)
    assert "final/sgd-b32-s0: FAILED (exit 2)" in told.stdout
    assert "1 points failed: final/sgd-b32-s0" in told.stderr and "Traceback" not in told.stderr
    assert "does not exist" in (out / "logs/final-sgd-b32-s0.txt").read_text()
    assert (out / "final/adamw-b32-s0/summary.json").exists()


def test_points_of_two_ranks_train_on_two_ranks(tmp_path):
    """torchrun took the point's --m for a short form of its own --master_port, and every point with
    an m failed."""
    one = {"methods": {"sam": {"m": 16}}, "batch_size": [32], "seeds": [0], "tune": None}
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    told = subprocess.run(
        command(written(tmp_path, **one), "--out", str(tmp_path / "out"), "--ranks", "2"),
        capture_output=True, text=True, timeout=600, env=env,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
    summary = json.loads((tmp_path / "out/final/sam-b32-s0/summary.json").read_text())
    assert summary["world_size"] == 2


WRONG = {
    "same number of trials": {"methods": {"adamw": {"tune": {"lr": [1, 2]}},
                                          "sam": {"tune": {"rho": [1]}}}},
    "holds 'learning_rate', no setting": {"settings": {"learning_rate": 1}},
    "holds 'seed', which the sweep sets itself": {"settings": {"seed": 1}},
    "optimizer must be one of": {"methods": {"adam": {"tune": {"lr": [1]}}}},
    "may hold settings, methods": {"batch_sizes": [1]},
    "batch_size must be whole numbers": {"batch_size": ["many"]},
    "seeds must be different": {"seeds": [1, 1]},
    "list of different numbers": {"methods": {"adamw": {"tune": {"lr": 0.1}}}},
    "there is no `tune:` section": {"tune": None},
    "tune.holdout must be whole numbers": {"tune": {"seed": 1}},
    "letters, digits": {"methods": {"look sam": {}}},
    "look_sam at batch size 32: rho must": {"methods": {"look_sam": {"tune": {"rho": [-1]}}}},
}  # fmt: skip


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_file_is_one_sentence(sentence, tmp_path):
    with pytest.raises(ConfigError) as told:
        grid.read(written(tmp_path, **WRONG[sentence]))
    assert sentence in str(told.value)


def test_what_is_wrong_on_the_command_line_is_one_sentence(tmp_path):
    told = run(tmp_path / "none.yaml", code=2)
    assert told.stderr.count("\n") == 1 and "needs a YAML file" in told.stderr
    (tmp_path / "text").write_text("one line\n" * 1000)
    told = run(tmp_path / "text", code=2)  # it printed the whole file
    assert "must be lines of `name: value`, got 'one" in told.stderr and len(told.stderr) < 300
    told = run(written(tmp_path), "--", "--nodes", "2", code=2)
    assert told.stderr.count("\n") == 1 and "add --slurm" in told.stderr
    told = run(written(tmp_path), "--ranks", "2", "--jobs", "2", "--devices", "0,1,2", code=2)
    assert told.stderr.count("\n") == 1 and "2 x 2, got 3" in told.stderr


def test_a_dry_run_lists_the_points_and_makes_nothing(tmp_path):
    told = run(written(tmp_path), "--out", str(tmp_path / "out"), "--dry_run")
    assert f"{POINTS} points: 0 are done, 4 can run now, 8 are known once" in told.stdout
    assert not (tmp_path / "out").exists()


def test_the_shipped_sweeps_are_whole():
    paths = list((Path(__file__).parents[2] / "launch" / "sweeps").glob("*.yaml"))
    assert paths
    for path in paths:
        sweep = grid.read(path)
        chosen = {(m, b): {} for m in sweep.methods for b in sweep.tuned_at}
        points = [*trials(sweep), *sweep.finals(chosen)]
        assert sweep.total == len(points) == len({p.name for p in points})
        assert len({len(c) for c in sweep.candidates.values()}) <= 1  # none: nothing is tuned


def test_a_yes_or_no_setting_reaches_train(tmp_path):
    """`--offload true` is no flag of train.py; `--offload` and `--no_offload` are."""
    settings = {**SWEEP["settings"], "requeue": True, "offload": False}
    sweep = grid.read(written(tmp_path, settings=settings))
    words = trials(sweep)[0].argv()
    assert "--requeue" in words and "--no_offload" in words
    assert parse(words).requeue and not parse(words).offload


def test_a_run_that_was_told_to_stop_is_not_started_again_at_once(tmp_path):
    """`dist-looksam cancel` ends a run well; the sweep once started it anew for ever."""
    out = tmp_path / "out"
    one = {"methods": {"adamw": {"steps": 100000}}, "batch_size": [32], "seeds": [0], "tune": None}
    plain = {k: v for k, v in SWEEP["settings"].items() if k != "steps"}
    file = written(tmp_path, **one, settings=plain)
    sweep = subprocess.Popen(
        command(file, "--out", str(out)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        run_dir, end = out / "final/adamw-b32-s0", time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists():
            assert time.monotonic() < end and sweep.poll() is None
            time.sleep(0.1)
        os.kill(json.loads((run_dir / "job.json").read_text())["pid"], signal.SIGTERM)
        said, told = sweep.communicate(timeout=120)
    finally:
        sweep.kill()
    assert sweep.returncode == 1 and said.count("FAILED (exit 0)") == 1
    assert "1 points failed: final/adamw-b32-s0" in told


def test_ctrl_c_saves_what_runs_and_says_how_to_go_on(tmp_path):
    """A terminal sends SIGINT to the sweep and to its runs alike."""
    out = tmp_path / "out"
    one = {"methods": {"adamw": {"steps": 100000}}, "batch_size": [32], "seeds": [0], "tune": None}
    plain = {k: v for k, v in SWEEP["settings"].items() if k != "steps"}
    sweep = subprocess.Popen(
        command(written(tmp_path, **one, settings=plain), "--out", str(out)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        run_dir, end = out / "final/adamw-b32-s0", time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists():
            assert time.monotonic() < end and sweep.poll() is None
            time.sleep(0.1)
        os.killpg(sweep.pid, signal.SIGINT)
        _, told = sweep.communicate(timeout=120)
    finally:
        sweep.kill()
    assert sweep.returncode == 130 and told == "stopped; the same command goes on from here\n"
    assert list(run_dir.glob("checkpoints/step-*/manifest.json"))


FAKE = """#!/bin/sh
echo "slurm_load_jobs error: Unable to contact slurm controller" >&2
exit 1
"""


def test_a_squeue_that_does_not_answer_stops_and_clears_nothing(tmp_path):
    """Taken for an empty queue, running points were sent again and their folders removed."""
    sweep = grid.read(written(tmp_path))
    ledger = Ledger(sweep, tmp_path / "out")
    point = trials(sweep)[0]
    ledger.prepare(point)
    (ledger.path(point) / "metrics.jsonl").write_text("{}")
    (ledger.out / "slurm").mkdir()
    row = {"job": "17", "points": [point.name]}
    (ledger.out / "slurm/arrays.jsonl").write_text(json.dumps(row) + "\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("squeue", "sbatch"):
        (programs / name).write_text(FAKE)
        (programs / name).chmod(0o755)
    done = subprocess.run(
        command(tmp_path / "sweep.yaml", "--out", str(ledger.out), "--slurm"),
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 1 and "squeue does not answer: slurm_load_jobs" in done.stderr
    assert (ledger.path(point) / "metrics.jsonl").exists()


def test_in_a_job_a_squeue_that_does_not_answer_is_asked_again(tmp_path, monkeypatch):
    """Nobody calls again there: the sweep had stopped for good."""
    (tmp_path / "squeue").write_text(
        f"#!/bin/sh\n[ -e {tmp_path}/asked ] && echo RUNNING && exit\n"
        f"touch {tmp_path}/asked\n{FAKE.partition(chr(10))[2]}"
    )
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert array._in_queue("17")


def test_a_diverged_trial_scores_nothing(tmp_path):
    """NaN compares false with everything; as a maximum it once would have been chosen."""
    sweep = grid.read(written(tmp_path))
    ledger = Ledger(sweep, tmp_path / "out")
    for trial, top1 in zip(sweep.trials("adamw", 32), (float("nan"), 0.1), strict=True):
        ledger.prepare(trial)
        (ledger.path(trial) / "summary.json").write_text(json.dumps({"top1": top1}))
    assert ledger.chosen()["adamw", 32] == {"lr": 0.005}
