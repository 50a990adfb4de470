"""Signals that ask a run to stop: noted at once, obeyed by all ranks after the same step."""

import signal
import subprocess
import threading
from types import FrameType, TracebackType
from typing import Any

from ..errors import RunError
from ..world import slurm_job

WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REQUEUES = (signal.SIGUSR1, signal.SIGUSR2)  # a scheduler's, ahead of a time limit


class Interrupt:
    """Inside the context, SIGTERM and SIGUSR1/2 end nothing; `caught` is the first that came."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {s: signal.signal(s, self._note) for s in WATCHED}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = self.caught or signal.Signals(number)


def requeue() -> str | None:
    """Put this SLURM job back into the queue. Rank 0 only. A sentence if it was; None outside jobs.

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
