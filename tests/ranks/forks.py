"""Ranks forked from a process that has imported everything: a start takes tenths of a second."""

import functools
import gc
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_looksam.backends.zero import library as zero_library


def share() -> None:
    """What was imported, and torch's compiler, which else each rank's first optimizer imports. It
    is no garbage: a rank that collects need not go through it.

    Altair is not: runs draw no curves.png, as where it is not installed, which took half of their
    time.
    """
    import torch._dynamo  # noqa: F401

    sys.modules["altair"] = None  # type: ignore[assignment]
    gc.freeze()


def load_deepspeed() -> Any:
    """DeepSpeed, with what else each rank would do by itself: import Muon at its first engine;
    start a program that counts NUMA nodes, at every reduction of stage 3."""
    deepspeed = zero_library.load_deepspeed()
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
    from deepspeed.utils import numa

    numa.get_numa_cores = functools.cache(numa.get_numa_cores)
    return deepspeed


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


def play(
    folder: Path,
    ranks: int,
    run: Callable[[Any], object],
    jobs: Iterable,
    timeout: timedelta | None = None,
) -> None:
    """The jobs, one after another, on so many ranks of a process group. What they print is in
    folder/log, and printed here if one ends badly."""
    meet = Path(tempfile.mkdtemp(dir=folder)) / "meet"  # a file to meet in, not there yet
    jobs = list(jobs)
    share()

    def main(rank: int) -> int:
        dist.init_process_group(
            "gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks, timeout=timeout
        )
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
