"""cluster/setup.sh, as far as it can be tried without installing anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path):
    (tmp_path / "cluster").mkdir()
    shutil.copy(ROOT / "cluster" / "setup.sh", tmp_path / "cluster")
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "dist_looksam" / "data").mkdir(parents=True)
    for path in (ROOT / "dist_looksam" / "data").glob("*.c"):
        shutil.copy(path, tmp_path / "dist_looksam" / "data")
    return tmp_path


def set_up(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "cluster/setup.sh", *arguments],
        cwd=project,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_half_removed_venv_is_made_anew_and_not_used(project):
    """An interrupted `rm -rf .venv` once left bin/python without pyvenv.cfg. That is the machine's
    own Python under another name, and the next set-up installed 50 packages into the machine."""
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    told = set_up(project, PYTHON="/bin/false")
    assert told.returncode == 2
    assert "needs Python 3.10" in told.stderr  # it went to make a new one, and could not


def test_an_unusable_python_is_one_sentence(project):
    told = set_up(project, PYTHON="/bin/false")
    assert told.returncode == 2
    assert told.stderr.count("\n") == 1 and "set PYTHON=" in told.stderr


def test_an_unknown_argument_is_one_sentence(project):
    told = set_up(project, "--al")
    assert told.returncode == 2
    assert "allowed: --all" in told.stderr
