"""SIGKILL at random moments on several ranks, a short form of tests/ranks/kill_campaign.py."""

import re
import sys

import pytest

from launch import HERE, run

pytestmark = pytest.mark.needs("deepspeed")


def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_not(tmp_path):
    """Bit-identical weights, averages and metrics: one under DDP; and under plain, ZeRO-2 and FSDP2
    runs that start from weights and have all augmentations, losses and lrs by layer at once."""
    command = [sys.executable, str(HERE / "kill_campaign.py"), "--short", "--kills", "4"]
    said = run(command, 1200, {"TMPDIR": str(tmp_path)}).splitlines()
    assert re.fullmatch(r"4 kills, [0-4] while .*, 4 cases, 0 differ", said[-1]), said
