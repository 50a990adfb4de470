"""Any to any, a short form: tests/ranks/checkpoint_matrix.py has the full matrix.

On the way every reader compares what it holds with what was written, bit for bit, g_v and all.
"""

import sys

import pytest
from checkpoint_matrix import BACKENDS, EXACT, RANKS, SHORT
from checkpoint_matrix import written as written_by
from resumes import assert_goes_on, assert_same_bits, assert_same_state

from dist_looksam.checkpoint import Reader
from launch import HERE, run

pytestmark = pytest.mark.needs("deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All checkpoints and all continuations, by one process that forks the ranks."""
    folder = tmp_path_factory.mktemp("matrix")
    run(
        [sys.executable, str(HERE / "checkpoint_matrix.py"), "--short", "--folder", folder],
        1400,
        {},
    )
    return folder


@pytest.mark.parametrize("writer, reader", SHORT)
def test_any_ranks_and_backend_go_on_from_any_other(folder, writer, reader):
    assert_goes_on(folder, writer, reader)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gv_in_a_checkpoint_is_that_of_one_rank(folder, ranks, backend):
    """By value: a lost or shuffled g_v still trains, and its weights are not far off."""
    mine, one = (Reader(written_by(folder, side)) for side in ((ranks, backend), (1, "ddp")))
    assert mine.keys == one.keys == ["g_v", "momentum_buffer"]
    assert_same_state(mine, one)


@pytest.mark.parametrize("number", range(len(EXACT)), ids=[str(case) for case in EXACT])
def test_the_same_ranks_and_backend_go_on_bit_for_bit(folder, number):
    """A run that had just resumed once added the ranks' gradients in another order than the run
    that was not interrupted: DDP sorts its buckets after the first pass of a process."""
    assert_same_bits(folder, number)
