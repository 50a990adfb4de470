"""Progress of a run: a bar on a terminal, lines at intervals elsewhere and in a log file."""

import math
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import IO, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.progress import Task as BarTask
from rich.table import Column
from rich.text import Text

# Set by mpirun and horovodrun, which give ranks a terminal but read it through a pipe.
_PIPED = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "HOROVOD_RANK", "HOROVOD_GLOO_RENDEZVOUS_ADDR")
_WINDOW_S = (
    60.0  # the pace is that of the last minute, so that a slow first step counts only at first
)


def h_mm_ss(seconds: float) -> str:
    """A duration in seconds as hours:minutes:seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Progress:
    """Shows `step done/total`, loss, top1, images/s and the time left. Use it as a context manager.

    Takes numbers that are on the host already. With `shown` False, on all ranks but one, all
    methods do nothing. `start` is the number of steps before a resume. Shows a bar on a terminal,
    elsewhere a line every `every_seconds` and for the first and last step. `log` is a file that
    gets the same lines with their times, also where there is a bar. `unit` is counted; `facts` are
    the names of the numbers beside it.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        shown: bool = True,
        every_seconds: float = 10.0,
        file: IO[str] | None = None,
        log: Path | None = None,
        unit: str = "step",
        facts: tuple[str, ...] = ("loss", "top1", "images/s"),
    ) -> None:
        self.total = total
        self.unit = unit
        self._shown = shown
        self._every = every_seconds
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), start)])
        self._printed: float | None = None
        self._step = start
        self._facts = dict.fromkeys(facts, "-")
        self._epoch = ""
        self._look = False
        self._console = Console(file=file or sys.stdout, highlight=False, markup=False)
        self._log = _log(log) if shown and log else None
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        if shown and terminal and not any(name in os.environ for name in _PIPED):
            self._bar = Bar(*_columns(self), console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task("", total=total, completed=start)

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        images_per_s: float | None = None,
        mfu: float | None = None,
        peak_memory: int | None = None,
        epoch: float | None = None,
        look: bool = False,
        **facts: str,
    ) -> None:
        """`step` steps are done; `look` is of the last one. None leaves a number as it was.
        `peak_memory`: bytes."""
        if not self._shown:
            return
        now = time.monotonic()
        self._step, self._look = step, look
        self._marks.append((now, step))
        while len(self._marks) > 2 and self._marks[1][0] < now - _WINDOW_S:
            self._marks.popleft()
        if loss is not None:
            self._facts["loss"] = f"{loss:.4f}"
        if images_per_s is not None:
            self._facts["images/s"] = f"{images_per_s:,.0f}" if images_per_s < 1e9 else "-"
        if mfu is not None:
            self._facts["MFU"] = f"{mfu:.1%}"
        if peak_memory is not None:
            self._facts["GiB"] = f"{peak_memory / 2**30:.1f}"
        self._facts |= facts
        if epoch is not None:
            self._epoch = f" epoch {int(epoch)}"
        self._show(now)

    def evaluation(
        self, step: int, top1: float, loss: float, ema_top1: float | None = None, **_: float
    ) -> None:
        """The accuracy, a fraction, and mean loss on the evaluation images after `step` steps; and
        the accuracy of averaged weights."""
        self._facts["top1"] = f"{top1:.4f}"
        ema = "" if ema_top1 is None else f" ema top1 {ema_top1:.4f}"
        self.note(f"step {step}/{self.total} evaluation: top1 {top1:.4f} loss {loss:.4f}{ema}")

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._shown:
            encoding = self._console.encoding  # names of files may have what it cannot say
            said = text.encode(encoding, "backslashreplace").decode(encoding)
            self._console.print(said, soft_wrap=True)
            self._write(text)

    def eta(self) -> str:
        """Time left, h:mm:ss, at the pace of the last minute; `-:--:--` before there is one."""
        (since, first), (now, last) = self._marks[0], self._marks[-1]
        if last <= first or now <= since:
            return "-:--:--"
        return h_mm_ss(math.ceil((self.total - last) * (now - since) / (last - first)))

    def line(self) -> str:
        """The line for a log file."""
        facts = " ".join(f"{name} {value}" for name, value in self._facts.items())
        return f"{self.unit} {self._step}/{self.total} {facts} ETA {self.eta()}{self._epoch}"

    def _show(self, now: float) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._step)
        due = self._printed is None or now - self._printed >= self._every
        if due or self._step >= self.total:
            self._printed = now
            if self._bar is None:
                self.note(self.line())
            else:
                self._write(self.line())

    def _write(self, text: str) -> None:
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._log is not None:
            self._log.close()


def _log(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)


class _Facts(ProgressColumn):
    """The numbers beside the bar; a filled mark shows that the last step was a look."""

    max_refresh = 0.25

    def __init__(self, progress: Progress) -> None:
        super().__init__(table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._progress = progress

    def render(self, task: BarTask) -> Text:
        text = Text()
        if self._progress.unit == "step":
            text.append("● " if self._progress._look else "○ ", style="yellow")
        for name, value in self._progress._facts.items():
            text.append(f"{name} ", style="dim")
            text.append(f"{value}  ")
        text.append("ETA ", style="dim")
        text.append(self._progress.eta(), style="cyan")
        text.append(self._progress._epoch, style="dim")
        return text


def _columns(progress: Progress) -> tuple[ProgressColumn, ...]:
    return (
        TextColumn(progress.unit + " {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=max(6, min(40, progress._console.width - 103))),
        _Facts(progress),
    )
