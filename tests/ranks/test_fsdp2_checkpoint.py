"""Checkpoints of FSDP2: read by every backend, and every backend's by it; bit for bit on its own.

On the way every reader compares what it holds with what was written, bit for bit, g_v and all.
"""

import sys

import pytest
import task
from checkpoint_matrix import written as written_by
from fsdp_matrix import EXACT, OWN, PAIRS
from resumes import assert_goes_on, assert_same_bits, assert_same_state

from dist_looksam.checkpoint import Reader
from launch import HERE, run

pytestmark = pytest.mark.needs("deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All checkpoints and all continuations, by one process that forks the ranks."""
    folder = tmp_path_factory.mktemp("fsdp-matrix")
    run([sys.executable, str(HERE / "fsdp_matrix.py"), "--folder", str(folder)], 900, {})
    return folder


@pytest.mark.parametrize("writer, reader", PAIRS)
def test_any_ranks_and_backend_go_on_from_any_other(folder, writer, reader):
    assert_goes_on(folder, writer, reader)


@pytest.mark.parametrize("side", OWN)
def test_a_checkpoint_holds_every_entry_once_and_is_that_of_one_rank(folder, side):
    """Ranks with copies of the same rows share out what they write."""
    mine, one = (Reader(written_by(folder, s)) for s in (side, (1, "ddp")))
    assert mine.keys == one.keys == ["g_v", "momentum_buffer"]
    entries = 0
    for part in mine.manifest["parts"]:
        entries += sum(stop - start for _, _, start, stop in part["pieces"])
    assert entries == 3 * sum(p.numel() for p in task.net().parameters())
    assert_same_state(mine, one)


@pytest.mark.parametrize("number", range(len(EXACT)), ids=[str(case) for case in EXACT])
def test_the_same_ranks_go_on_bit_for_bit(folder, number):
    assert_same_bits(folder, number)
