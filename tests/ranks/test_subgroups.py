"""A module that the user has wrapped for some of the ranks trains with these alone."""

import subprocess
import sys

import launch


def test_ddp_over_a_process_group_of_its_own_knows_no_other_ranks(tmp_path):
    """Two ranks, each with a model of its own in DistributedDataParallel(process_group=...): the
    reported loss was the mean over both models, and with ascent="rank" so was g: weights off by
    .016, without a word."""
    worker = str(launch.HERE / "subgroup_worker.py")
    running = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(tmp_path)],
            env=launch.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
