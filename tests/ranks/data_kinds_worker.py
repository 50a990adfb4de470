"""Runs of train.py on ranks of its own, one after another; a run may be killed and go on.

What is imported without being used here is imported once, instead of by every rank.

python data_kinds_worker.py JOBS.json
whose jobs are [ranks, flags, step to be killed at or null, exit code of each rank or 0 by default]
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import forks
import torch
import torch.distributed as dist

from dist_looksam.data import (
    TrainLoader,
    tar,  # noqa: F401
)
from dist_looksam.run import train


def run(folder: Path, ranks: int, flags: list[str], kill_at: int | None, code: int = 0) -> None:
    """Every rank ends by SIGKILL in step `kill_at`; without it, by itself with `code`."""
    meet = Path(tempfile.mkdtemp(dir=folder)) / "meet"

    def main(rank: int) -> int:
        if kill_at is not None:
            step = TrainLoader.step
            TrainLoader.step = lambda self, t: (
                os.kill(os.getpid(), signal.SIGKILL) if t == kill_at else step(self, t)
            )
        if ranks > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks
            )
        return train.main(flags)

    children = [
        forks.fork(lambda rank=rank: main(rank), folder / "log", **forks.place(rank, ranks))
        for rank in range(ranks)
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    wanted = code if kill_at is None else -signal.SIGKILL
    assert {*codes} == {wanted}, f"{codes}: {(folder / 'log').read_text()[-4000:]}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    torch.set_num_threads(1)
    forks.load_deepspeed()
    forks.share()
    for job in json.loads(file.read_text()):
        run(file.parent, *job)
