"""What is known about one run directory while it is watched."""

import json
import math
import os
import re
import stat
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from ..record import jobs, metrics, rundir
from ..record.progress import h_mm_ss
from ..report import about
from ..report.statistic import many
from .lines import Lines
from .series import Series

_SMALL = 2**16  # bytes; the files below are much smaller
_READ = (rundir.CONFIG, rundir.JOB, rundir.SUBMITTED, rundir.SUMMARY, rundir.LOCK)
_BAD = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
_FIELDS = ("loss", "lr", "grad_norm", "gv_ratio", "images_per_s", "mfu")
_EVALUATED = ("eval_top1", "eval_loss", "ema_top1")
_LAST = ("lr", "looks")  # drawn as they are; others as means of groups
_RESUMED = re.compile(rb"resumed from .* at step (\d{1,12})$")
_JOB = re.compile(r"\d{1,12}(_\d{1,9})?")
_RECENT, _LOG_LINES = 50, 12
_STATE_S, _SLURM_S = 2.0, 15.0  # how long a state is believed


class Watched:
    """A run directory, read again by `refresh`. It may be empty, foreign, or removed meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = {}
        self.state = "nothing here yet"
        self.log: deque[str] = deque(maxlen=_LOG_LINES)
        self._metrics = Lines(folder / rundir.METRICS)
        self._text = Lines(folder / rundir.LOG, last=2**22)
        self._job: dict[str, Any] = {}
        self._asked, self._queued_at = 0.0, -math.inf
        self._queued: jobs.Queued | None = None
        self._resumed: list[int] = []
        self._start()

    def _start(self) -> None:
        self.series: dict[str, Series] = {}
        self.steps = self.looks = self.skips = self.foreign = 0
        self.skipped: deque[int] = deque(maxlen=300)
        self.last: dict[str, float] = {}
        self._recent: deque[dict[str, float]] = deque(maxlen=_RECENT)

    def refresh(self) -> bool:
        """Read what is new. Returns whether there is something to draw again."""
        if not self.folder.is_dir():
            self.state, gone = "removed", self.state != "removed"
            return gone
        self._ask()
        void, lines = self._metrics.new()
        if void:
            self._start()
        for line in lines:
            self._take(line)
        return bool(self._take_log() or void or lines)

    # metrics.jsonl

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            step = row["step"]
        except _BAD:
            self.foreign += 1
            return
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
            self.foreign += 1
        elif "eval_top1" in row:
            self._add(step, {name: row.get(name) for name in _EVALUATED})
        else:
            self._take_step(step, row)

    def _take_step(self, step: int, row: dict[str, Any]) -> None:
        self.steps, look = step + 1, row.get("look") is True
        self.looks += look
        if row.get("skipped") is True:
            self.skips += 1
            self.skipped.append(step)
        values: dict[str, Any] = {name: row.get(name) for name in _FIELDS}
        values["looks"] = self.looks
        values["loss of looks" if look else "loss between"] = row.get("loss")
        numbers = self._add(step, values)
        for name in ("seconds", "peak_memory"):
            if (number := _number(row.get(name))) is not None:
                numbers[name] = self.last[name] = number
        self._recent.append(numbers | {"step": step})
        self.last["loss"] = numbers.get("loss", math.nan)  # a skipped step may have none

    def _add(self, step: int, values: dict[str, Any]) -> dict[str, float]:
        numbers = {}
        for name, value in values.items():
            if (number := _number(value)) is not None:
                self.series.setdefault(name, Series(last=name in _LAST)).add(step, number)
                numbers[name] = number
        self.last |= numbers
        return numbers

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Points by name: fields of metrics.jsonl, `loss of looks`, `loss between`, `looks` (their
        number so far); `skipped` and `resumed` have steps alone."""
        made = defaultdict(list, {name: series.points() for name, series in self.series.items()})
        made["skipped"] = [(step, 0.0) for step in self.skipped]
        made["resumed"] = [(step, 0.0) for step in self._resumed if step < self.steps]
        return made

    @property
    def group(self) -> int:
        """The number of steps that a point stands for, at most."""
        return max((series.size for series in self.series.values()), default=1)

    # log.txt

    def _take_log(self) -> bool:
        void, lines = self._text.new()
        if void:
            self.log.clear()
            self._resumed.clear()
        self.log.extend(line.decode(errors="replace")[:400] for line in lines[-_LOG_LINES:])
        found = [int(match[1]) for line in lines if (match := _RESUMED.search(line))]
        self._resumed = [*self._resumed, *found][-50:]
        return bool(found)

    # The other files, which are small.

    def _ask(self) -> None:
        if time.monotonic() - self._asked < _STATE_S:
            return
        self._asked = time.monotonic()
        try:
            self._check()
            self.config = {n: _plain(v) for n, v in about.config_of(self.folder).items()}
            self._job = rundir.job(self.folder)
            if not any((self.folder / n).exists() for n in (*_READ, rundir.METRICS, rundir.LOG)):
                self.state = "nothing here yet"
            else:
                self.state = jobs.state_of(self.folder, self._job, self._slurm())
        except _BAD as error:
            self.state = f"unknown: {' '.join(str(error).split())[:200]}"

    def _check(self) -> None:
        """ValueError for a file that no run writes, before something opens it."""
        for name in _READ:
            try:
                found = (self.folder / name).stat()
            except OSError:
                continue
            if not stat.S_ISREG(found.st_mode) or found.st_size > _SMALL:
                raise ValueError(f"{name} is not a file that a run writes")

    def _slurm(self) -> jobs.Queued | None:
        number = self._job.get("slurm_job_id")
        if not isinstance(number, str) or not _JOB.fullmatch(number):
            return None
        if time.monotonic() - self._queued_at > _SLURM_S:
            self._queued, self._queued_at = jobs.slurm_job(number), time.monotonic()
        return self._queued

    # The row of the table.

    def row(self) -> dict[str, Any]:
        """Texts for the page."""
        total = self.config.get("steps")
        total = total if isinstance(total, int) else 0
        last, finished = self.last, self.state == "finished"
        return {
            "directory": str(self.folder),
            "state": self.state,
            "step": f"{self.steps:,} / {total:,}" if total else f"{self.steps:,}",
            "share": min(1.0, self.steps / total) if total else 0.0,
            "loss": f"{last['loss']:.4f}" if "loss" in last else "-",
            "top1": f"{last['eval_top1']:.2%}" if "eval_top1" in last else "-",
            "images/s": f"{speed:,.0f}" if (speed := self._rate("images_per_s")) else "-",
            "MFU": f"{mfu:.1%}" if (mfu := self._rate("mfu")) else "-",
            "GiB": f"{last['peak_memory'] / 2**30:.1f}" if last.get("peak_memory") else "-",
            "ETA": "-" if finished else self._eta(total),
            "looks": f"{self.looks:,} ({self.looks / self.steps:.0%})" if self.steps else "-",
            "skipped": f"{self.skips:,}",
            "newest line": self._age(),
            "job": self._job_text(),
            "notes": self._notes(),
            "log": list(self.log),
        }

    def _rate(self, name: str) -> float | None:
        """Of the last 20 steps together."""
        return metrics.rate([row[name] for row in self._recent if row.get(name)][-20:])

    def _eta(self, total: int) -> str:
        """Training time that is left at the pace of the newest steps; evaluations not counted."""
        timed = [row for row in self._recent if "seconds" in row]
        if self.state != "running" or len(timed) < 2 or not total:
            return "-"
        first, last = timed[0], timed[-1]
        if last["step"] <= first["step"] or last["seconds"] <= first["seconds"]:
            return "-"
        pace = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
        return h_mm_ss(min(1e9, max(0, total - self.steps) * pace))

    def _age(self) -> str:
        changed = self._metrics.changed
        if changed is None:
            return "-"
        seconds = max(0.0, time.time() - changed)
        return f"{seconds:.0f} s ago" if seconds < 120 else f"{h_mm_ss(seconds)} h ago"

    def _job_text(self) -> str:
        job = self._job
        hosts = job.get("hosts")
        named = [str(host)[:60] for host in hosts[:3]] if isinstance(hosts, list) else []
        more = f" and {len(hosts) - 3} more" if isinstance(hosts, list) and len(hosts) > 3 else ""
        slurm = job.get("slurm_job_id")
        ranks = many(job["ranks"], "rank") if _number(job.get("ranks")) is not None else ""
        parts = [f"SLURM {_short(slurm)}" if slurm else _short(job.get("launcher") or "")]
        parts += [ranks, ", ".join(named) + more]
        return ", ".join(part for part in parts if part) or "-"

    def _notes(self) -> list[str]:
        notes = []
        if self.state == "removed":
            notes.append("The directory is gone; this is what was read before.")
        if isinstance(starts := self._job.get("starts"), int) and starts > 1:
            at = ", ".join(f"{step:,}" for step in self._resumed[-5:])
            resumed = f"; resumed at step {at}" if at else ""
            notes.append(f"Started {_short(starts)} times{resumed}.")
        if self.skips:
            notes.append(
                f"{many(self.skips, 'step')} skipped, because a gradient was not finite; the last "
                f"was step {self.skipped[-1]:,}."
            )
        if self.foreign:
            notes.append(f"{self.foreign:,} lines of metrics.jsonl are not of this program.")
        if self._metrics.share < 0.999 and os.path.exists(self._metrics.path):
            notes.append(f"{self._metrics.share:.0%} of metrics.jsonl has been read.")
        return notes


def _number(value: Any) -> float | None:
    """A finite number that can be drawn; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e30 else None  # NaN fails, too


def _short(value: Any) -> str:
    return str(value)[:60]


def _plain(value: Any) -> Any:
    """A setting as it is if it is short; a list of short ones as text; else None."""
    if isinstance(value, str):
        return value[:100]
    if isinstance(value, list) and len(value) < 9 and not any(isinstance(x, list) for x in value):
        return ", ".join(str(_plain(x)) for x in value)
    return value if isinstance(value, bool | float) or _number(value) is not None else None
