"""Workers that are forked fail and end as those of a launcher would."""

import subprocess
import sys

import pytest

from launch import HERE, run

COMMAND = [sys.executable, str(HERE / "train_worker.py"), "/no/such/cases.json"]


def test_a_worker_that_takes_too_long_is_killed():
    with pytest.raises(subprocess.TimeoutExpired):
        run(COMMAND, 0, {})


def test_a_worker_that_fails_says_why():
    with pytest.raises(AssertionError, match=r"No such file or directory: '/no/such/cases\.json'"):
        run(COMMAND, 60, {})
