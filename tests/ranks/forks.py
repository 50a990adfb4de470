"""Ranks forked from a process that has imported everything: a start takes tenths of a second."""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


def fork(work: Callable[[], int], log: Path, **environment: object) -> int:
    """Run work() in a child, its output added to `log`, its result the exit code. The child's id.

    No destructor runs at the child's end, as none would after a kill.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ |= {name: str(value) for name, value in environment.items()}
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def place(rank: int, ranks: int) -> dict[str, object]:
    """The variables that launchers set for a rank on one machine."""
    here = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "GLOO_SOCKET_IFNAME": "lo"}
    return {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", **here}


def finish(children: list[int], until: Callable[[], bool] = lambda: False) -> bool:
    """True if all ended by themselves before `until` came true; else they are killed.

    AssertionError if one ends badly; the others are killed then, too.
    """
    left = list(children)
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                code = os.waitstatus_to_exitcode(status)
                if code:
                    kill(left)
                    raise AssertionError(f"a rank ended with {code}")
        if left and until():
            kill(left)
            return False
        time.sleep(0.002)
    return True


def kill(children: list[int]) -> None:
    """SIGKILL, and wait for the end."""
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def play(folder: Path, ranks: int, run: Callable[[dict], object], jobs: list[dict]) -> None:
    """The jobs, one after another, on so many ranks of a process group. What they print is in
    folder/log, and printed here if one ends badly."""
    meet = Path(tempfile.mkdtemp(dir=folder)) / "meet"  # a file to meet in, not there yet

    def main(rank: int) -> int:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
        for job in jobs:
            run(job)
        dist.barrier()
        dist.destroy_process_group()
        return 0

    children = [
        fork(lambda rank=rank: main(rank), folder / "log", **place(rank, ranks))
        for rank in range(ranks)
    ]
    try:
        finish(children)
    except AssertionError:
        print((folder / "log").read_text()[-6000:])
        raise
