"""--track: what metrics.jsonl says is in TensorBoard and W&B, also after an interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_looksam.record import trackers
from dist_looksam.run import fit, train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FLAGS = ["--data", "digits", "--model", "vit_8", "--steps", "6", "--batch_size", "16", "--k", "3"]
FLAGS += ["--workers", "0", "--device", "cpu", "--backend", "plain", "--eval_every", "3"]


def interrupted(out: Path, track: str, monkeypatch) -> None:
    """A run that is told to stop at step 3 and then goes on to its end."""
    real = fit.Fit._step

    def step(self, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, number)

    flags = [*FLAGS, "--track", track, "--out", str(out), "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(fit.Fit, "_step", step)
        assert train.main(flags) == 0
    assert not (out / "summary.json").exists()
    assert train.main(flags) == 0


@pytest.mark.needs("tensorboard")
def test_tensorboard_shows_every_step_of_an_interrupted_run_once(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted(tmp_path / "run", "tensorboard", monkeypatch)
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "gv_ratio", "look", "eval_top1"):
        tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
        got = [(e.step, e.value) for e in shown.Scalars(tag)]
        want = [(row["step"], float(row[name])) for row in rows if row.get(name) is not None]
        assert [s for s, _ in got] == [s for s, _ in want] and len(got) > 1, tag
        assert [v for _, v in got] == pytest.approx([v for _, v in want], rel=1e-6), tag


@pytest.mark.needs("wandb")
def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupted(tmp_path / "run", "wandb", monkeypatch)
    name = (tmp_path / "run" / "wandb_id").read_text()
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2  # one for each start, both of one run
    until = time.monotonic() + 30  # wandb's own process writes them
    while not all(b"train/gv_ratio" in path.read_bytes() for path in files):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.needs("wandb")
def test_wandb_that_cannot_start_is_one_sentence(tmp_path):
    """In a process of its own, as wandb keeps the settings of its first start."""
    where = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true"}
    where |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "5"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *FLAGS, "--track", "wandb", "--out", "run"],
        cwd=tmp_path,
        env=os.environ | where,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "error: track wandb could not be started" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert train.main([*FLAGS, "--track", kind, "--out", str(tmp_path / "run")]) == 2
    said = f"error: track {kind} needs the package {kind}, which is not installed; install it"
    assert capsys.readouterr().err.startswith(said)
    assert not (tmp_path / "run").exists()
