"""Signals that stop a run: stored at once, acted on by all ranks after the same step."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

from ..errors import RunError
from ..world import slurm_job

WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
REQUEUES = (signal.SIGUSR1, signal.SIGUSR2)  # sent by schedulers before a time limit
INTERRUPTED = 128 + signal.SIGINT  # exit code
_AGAIN = 1.0  # seconds; a launcher may repeat the Ctrl-C that its ranks have already received


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the checkpoint was written and a note was printed."""


class Interrupt:
    """Inside the context, SIGTERM, SIGUSR1/2 and Ctrl-C do not end the process; `caught` is the
    first of them. A second Ctrl-C, at least a second later, ends the process at once.

    Where Ctrl-C was ignored before, as in the points of a sweep, it stays ignored.
    """

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows signal handlers in the main thread only
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        watched = WATCHED[:-1] if ignored else WATCHED
        self._before = {s: signal.signal(s, self._note) for s in watched}
        arrived, self._arrives = os.pipe()
        os.set_blocking(self._arrives, False)
        self._woken = signal.set_wakeup_fd(self._arrives, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_second, args=(arrived,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(self._woken)
        os.close(self._arrives)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = self.caught or signal.Signals(number)


def _end_at_second(arrived: int) -> None:
    """Runs in a thread, because Python calls handlers only when the main thread is back in Python,
    and a collective may wait for a lost rank. `arrived` gets a byte for each signal."""
    first = 0.0
    while number := os.read(arrived, 1):
        now = time.monotonic()
        if number[0] != signal.SIGINT:
            continue
        if first and now - first > _AGAIN:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the progress bar has hidden the cursor
            os._exit(INTERRUPTED)
        first = first or now
    os.close(arrived)


def requeue() -> str | None:
    """Requeue this SLURM job. Rank 0 only. Returns a note; None outside of SLURM jobs.

    Raises:
        RunError: SLURM refuses.
    """
    job = slurm_job()
    if not job:
        return None
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(f"job {job} could not be requeued: {error}.") from error
    if done.returncode:
        raise RunError(f"job {job} could not be requeued: {' '.join(done.stderr.split())}.")
    return f"job {job} is in the queue again"
