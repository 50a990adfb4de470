"""Points on this machine: some at a time, each in a process of its own.

One rank is forked from this process, which has imported everything, so that a start costs a tenth
of a second. Several ranks are started by torchrun.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from ..errors import RunError
from ..run import train
from .grid import Point
from .ledger import Ledger

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """jobs at a time, ranks each; devices: for CUDA_VISIBLE_DEVICES, one per rank of every job."""

    jobs: int = 1
    ranks: int = 1
    devices: Sequence[str] = ()


@dataclass
class _Running:
    point: Point
    slot: int
    began: float


class Stopped(Exception):
    """SIGINT or SIGTERM: the running points were told and have ended."""


def run(
    ledger: Ledger, place: Place, told: Callable[[str], None], ended: Callable[..., None]
) -> list[Point]:
    """Run every point that is due until none is left; returns those that failed.

    `ended(point, seconds, code)` is called after each. Raises Stopped.
    """
    running: dict[int, _Running] = {}
    failed: dict[str, Point] = {}

    def stop(signum: int, frame: object) -> None:
        raise Stopped

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            _start(ledger, place, told, running, failed)
            if not running:
                return list(failed.values())
            _collect(ledger, running, failed, ended)
    except Stopped:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        _end(running)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(running: dict[int, _Running]) -> None:
    """Tell all to save and stop, and wait; one of them may have ended this very moment."""
    for pid in running:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    for pid in running:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _start(
    ledger: Ledger,
    place: Place,
    told: Callable[[str], None],
    running: dict[int, _Running],
    failed: dict[str, Point],
) -> None:
    busy = {r.point.name for r in running.values()} | set(failed)
    due = [p for p in ledger.due()[0] if p.name not in busy]
    free = sorted(set(range(place.jobs)) - {r.slot for r in running.values()})
    for slot, point in zip(free, due):
        if note := ledger.prepare(point):
            told(note)
        running[_fork(ledger, place, point, slot)] = _Running(point, slot, time.monotonic())


def _collect(
    ledger: Ledger,
    running: dict[int, _Running],
    failed: dict[str, Point],
    ended: Callable[..., None],
) -> None:
    """Wait for one to end. One that was told to stop ends well and is not done: it counts as failed
    until the next call, or it would be started again at once. One that learnt nothing exits with 1
    but has its score: it is done."""
    pid, status = os.waitpid(-1, 0)
    if pid not in running:
        return
    one = running.pop(pid)
    code = os.waitstatus_to_exitcode(status)
    if ledger.summary(one.point) is None:
        failed[one.point.name] = one.point
    ended(one.point, time.monotonic() - one.began, code)


def _fork(ledger: Ledger, place: Place, point: Point, slot: int) -> int:
    log = ledger.log(point)
    log.parent.mkdir(parents=True, exist_ok=True)
    argv = [*point.argv(), "--out", str(ledger.path(point)), "--resume", "auto"]
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the sweep passes it on
        _die_with(parent)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for old, new in ((null, 0), (file, 1), (file, 2)):
            os.dup2(old, new)
        if place.devices:
            mine = place.devices[slot * place.ranks : (slot + 1) * place.ranks]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        code = _train(argv, place)
    except BaseException as error:  # it is the child's last word: in its log, and as exit code
        print(f"error: {error!r}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with(parent: int) -> None:
    """End when the sweep is killed, even by SIGKILL: a forgotten run would go on writing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            raise RunError("the sweep is gone")


def _train(argv: list[str], place: Place) -> int:
    threads = os.environ.get("OMP_NUM_THREADS")
    share = max(1, len(os.sched_getaffinity(0)) // (place.jobs * place.ranks))
    if place.ranks == 1:
        torch.set_num_threads(int(threads) if threads else share)
        return train.main(argv)
    os.environ["OMP_NUM_THREADS"] = threads or str(share)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += [str(place.ranks), "-m", "dist_looksam.cli.main", "train", *argv]
    os.execv(sys.executable, command)
