"""Killed at a random moment and resumed, a Horovod run is the same run: the short form."""

import random
import re
import sys

import pytest

from launch import HERE, run

pytestmark = pytest.mark.needs("horovod")


def test_a_killed_and_resumed_run_is_bit_identical_whole_and_sharded():
    """Each is killed once, with another seed every time; horovod_kills.py does as many as asked.
    The sharded one starts from weights and has all augmentations."""
    seed = str(random.SystemRandom().randrange(10**6))
    said = run([sys.executable, str(HERE / "horovod_kills.py"), "--short", "--seed", seed], 900, {})
    assert re.fullmatch(r"2 kills, [0-2] while .*, 2 cases, 0 differ", said.splitlines()[-1]), (
        f"seed {seed}: {said}"
    )
