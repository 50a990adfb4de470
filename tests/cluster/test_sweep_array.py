"""dist-looksam sweep --slurm: the same table as on one machine, by job arrays that follow on."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_launch import ROOT, SITE

pytestmark = [pytest.mark.needs("slurm"), pytest.mark.timeout(1200)]

SWEEP = {
    "settings": {"data": "digits", "model": "vit_8", "steps": 3, "augment": "none", "workers": 0},
    "batch_size": [32],
    "seeds": [0, 1],
    "tune": {"batch_size": [32], "seed": 9, "holdout": 300},
    "methods": {"adamw": {"tune": {"lr": [1e-6, 0.005]}}},
}  # fmt: skip
TOOL = [sys.executable, "-m", "dist_looksam.cli.main", "sweep"]


def test_arrays_under_slurm_end_with_the_table_of_a_local_sweep(testbed, tmp_path):
    """Trials as one array, then by itself the final points as another, then it says it is done."""
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SWEEP))
    env = SITE | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    options = ["--slurm", "--at_once", "2", "--", "--nodes=1", "--ntasks-per-node=1"]
    sent = [*TOOL, "s.yaml", "--out", str(out), *options]
    said = testbed.on("head", *sent, cwd=tmp_path, env=env)
    assert "0 points are done, 0 are in the queue, 2 were sent as array" in said
    again = testbed.on("head", *sent, cwd=tmp_path, env=env)  # nothing is sent twice
    assert "2 are in the queue" in again
    end = time.monotonic() + 600
    while not any("all 4 points are done" in p.read_text() for p in out.glob("logs/slurm-*.out")):
        assert time.monotonic() < end, [p.read_text() for p in out.glob("logs/*.out")]
        time.sleep(0.5)
    arrays = [json.loads(row) for row in (out / "slurm/arrays.jsonl").read_text().splitlines()]
    logs = [p.read_text() for p in out.glob("logs/*.out")]
    assert [len(a["points"]) for a in arrays] == [2, 2], logs  # each point once

    here = tmp_path / "here"
    local = [*TOOL, str(tmp_path / "s.yaml"), "--out", str(here), "--jobs", "2"]
    subprocess.run(local, check=True, timeout=600)
    assert (out / "table.md").read_text() == (here / "table.md").read_text()


def test_without_sbatch_it_is_one_sentence(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(SWEEP))
    told = subprocess.run(
        [*TOOL, str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--slurm"],
        capture_output=True, text=True, timeout=60,
        env={"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert told.returncode == 2 and told.stderr.count("\n") == 1
    assert "--slurm needs sbatch on the path" in told.stderr
