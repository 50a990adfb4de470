"""Ranks of Horovod over gloo, forked in place of horovodrun's: each runs the same worker.

python horovod_forked.py RANKS WORKER.py ARGUMENTS
"""

import runpy
import sys
import tempfile
from pathlib import Path

import forks
import horovod_forks
import torch


def main() -> None:
    torch.set_num_threads(1)
    forks.share()
    ranks, sys.argv = int(sys.argv[1]), sys.argv[2:]

    def work() -> int:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0

    with tempfile.TemporaryDirectory() as folder:
        horovod_forks.run(ranks, work, Path(folder, "log"))


if __name__ == "__main__":
    main()
