"""A run directory that commit 2b4ea09 has written (`train.py --data digits --optimizer look_sam
--steps 12 --batch_size 64 --eval_every 6 --probe_every 1`) is still read by every command."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from dist_looksam.cli.main import main

OLD = Path(__file__).parent / "old_run_dir"


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(OLD, tmp_path / "runs" / "old")


def test_jobs_lists_an_old_run(run, capsys):
    assert main(["jobs", str(run.parent)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "old" in line)
    assert "12" in line and "11.9" in line, line


def test_an_old_run_is_drawn(run):
    assert main(["curves", str(run)]) == 0
    assert (run / "curves.png").stat().st_size > 10_000
    assert main(["probe", str(run)]) == 0


def test_a_report_holds_an_old_run(run, tmp_path):
    assert main(["report", str(run.parent), "--out", str(tmp_path / "report")]) == 0
    table = tmp_path / "report" / "report.csv"
    [row] = csv.DictReader(table.open())
    assert float(row["top1"]) == pytest.approx(
        json.loads((OLD / "summary.json").read_text())["top1"]
    )


def test_the_settings_of_an_old_run_start_a_new_one(run, tmp_path, capsys):
    flags = ["--config", str(run / "config.yaml"), "--out", str(tmp_path / "new")]
    assert main(["train", *flags, "--dry_run"]) == 0
    assert "look_sam on adamw" in capsys.readouterr().out
