"""Points on this machine: a few at once, each in a process of its own.

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
from dataclasses import dataclass, field

import torch

from ..errors import RunError
from ..run import train
from .grid import Point
from .ledger import Ledger

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class LocalSlots:
    """How many points run at once, on how many ranks each.

    devices: for CUDA_VISIBLE_DEVICES, one per rank of every job.
    """

    jobs: int = 1
    ranks: int = 1
    devices: Sequence[str] = ()


class Stopped(Exception):
    """SIGINT or SIGTERM: the running points were stopped and have ended."""


@dataclass
class _Running:
    point: Point
    slot: int
    began: float


@dataclass
class LocalSweep:
    """Runs every point that is due.

    `note` prints a line; `ended(point, seconds, exit code)` is called after each point.
    """

    ledger: Ledger
    slots: LocalSlots
    note: Callable[[str], None]
    ended: Callable[[Point, float, int], None]
    running: dict[int, _Running] = field(default_factory=dict)  # by process number
    failed: dict[str, Point] = field(default_factory=dict)  # by name

    def run(self) -> list[Point]:
        """Run until no point is left; returns those that failed. Raises Stopped."""

        def stop(signum: int, frame: object) -> None:
            raise Stopped

        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while True:
                self._start()
                if not self.running:
                    return list(self.failed.values())
                self._collect()
        except Stopped:
            for number in before:
                signal.signal(number, signal.SIG_IGN)
            self._stop()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        """Ask all points to save and stop, and wait; one may have ended at this very moment."""
        for pid in self.running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for pid in self.running:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def _start(self) -> None:
        busy = {r.point.name for r in self.running.values()} | set(self.failed)
        due = [p for p in self.ledger.due()[0] if p.name not in busy]
        free = sorted(set(range(self.slots.jobs)) - {r.slot for r in self.running.values()})
        for slot, point in zip(free, due):
            if text := self.ledger.prepare(point):
                self.note(text)
            pid = _fork(self.ledger, self.slots, point, slot)
            self.running[pid] = _Running(point, slot, time.monotonic())

    def _collect(self) -> None:
        """Wait for one point to end.

        A point that was stopped exits with 0 and has no summary: it counts as failed until the next
        call, or it would be started again at once. A point that learnt nothing exits with 1 and has
        its score: it is done.
        """
        pid, status = os.waitpid(-1, 0)
        if pid not in self.running:
            return
        one = self.running.pop(pid)
        if self.ledger.summary(one.point) is None:
            self.failed[one.point.name] = one.point
        seconds = time.monotonic() - one.began
        self.ended(one.point, seconds, os.waitstatus_to_exitcode(status))


def _fork(ledger: Ledger, slots: LocalSlots, point: Point, slot: int) -> int:
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
        if slots.devices:
            devices = slots.devices[slot * slots.ranks : (slot + 1) * slots.ranks]
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        code = _train(argv, slots)
    except BaseException as error:  # into the point's log; the exit code is 99
        print(f"error: {error!r}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with(parent: int) -> None:
    """Get SIGTERM when the sweep ends, even by SIGKILL: else this run would go on writing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            raise RunError("the sweep is gone")


def _train(argv: list[str], slots: LocalSlots) -> int:
    threads = os.environ.get("OMP_NUM_THREADS")
    share = max(1, len(os.sched_getaffinity(0)) // (slots.jobs * slots.ranks))
    if slots.ranks == 1:
        torch.set_num_threads(int(threads) if threads else share)
        return train.main(argv)
    os.environ["OMP_NUM_THREADS"] = threads or str(share)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += [str(slots.ranks), "-m", "--"]  # what follows is the module's, also --m
    command += ["dist_looksam.cli.main", "train", *argv]
    os.execv(sys.executable, command)
