"""metrics.jsonl: one line per step and per evaluation, the same for interrupted runs."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import files
from .trackers import Tracker

FIELDS = (
    "step", "epoch", "loss", "lr", "grad_norm", "update_norm", "look", "skipped", "gv_norm",
    "gv_ratio", "rho", "images_per_s", "seconds", "mfu", "peak_memory",
)  # fmt: skip
_FLAGS = ("look", "skipped")

Value: TypeAlias = float | int | bool | Tensor | None
Row: TypeAlias = dict[str, Any]
Mark: TypeAlias = Any  # seconds of the host's clock, or a torch.cuda.Event


class MetricsLog:
    """Appends steps and evaluations to `path`; only one rank may hold a path.

    Values may be numbers or 0-dim tensors on any device. They are copied on the device when
    recorded and read together, one copy to the host for `every` records or `seconds` seconds, so
    that logging does not make the host wait at every step. NaN and infinity become null.

    A training line's step counts from 0 and names the weights its gradients were taken at. An
    evaluation's step is the number of steps done, so step S evaluates what checkpoint S holds.
    `seconds` is the training time when the device had completed the step, evaluations and
    checkpoints left out; `images_per_s` is the step's images over the time since the step before
    was completed. On a GPU both are taken from events that the host reads with the values.
    `mfu` is the share of the devices' peak that all passes of the step reached in this time: it is
    null unless `peak_share` is given, the share that one pass over one image a second is, by
    step.
    `peak_memory` is the largest number of bytes that this process had allocated on its GPU until
    the values were read; null on a CPU.

    `resume_step` is the next step to train: lines of this and later steps, evaluations of more
    steps, and a half-written last line are removed, atomically; None starts an empty file. Call
    `flush` before writing a checkpoint, so that a killed run's file reaches as far as it.
    `path` None writes nothing, for the other ranks. `tracker` gets the same lines as the file, and
    is closed at the end.
    Raises RunError for a file with a damaged line other than the last.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        resume_step: int | None = None,
        every: int = 50,
        seconds: float = 5.0,
        tracker: Tracker | None = None,
        device: torch.device | None = None,
        peak_share: Callable[[int], float] | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.last: Row | None = None  # newest training line read from the device; NaN stays NaN
        self.skips = 0  # steps in a row that were skipped, up to that line
        self.evaluated: int | None = None  # the step of the newest evaluation
        self._every = every
        self._patience = seconds
        self._tracker = tracker
        self._device = device if device is not None and device.type == "cuda" else None
        self._share = peak_share
        self._pending: list[dict[str, Value]] = []  # not yet read from the device
        self._ends: list[tuple[Mark, int | None]] = []  # of pending steps, and their images
        self._trained = 0.0
        if self.path is not None:
            self._open(self.path, resume_step or 0)
        self._completed = self._trained
        self._started = self._flushed = time.monotonic()

    def _open(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in files.json_lines(path) if _belongs(row, resume_step)]
        for row in rows:
            if "eval_top1" in row:
                self.evaluated = row["step"]
            else:
                self._newest(row)
        self._trained = float((self.last or {}).get("seconds") or 0.0)
        files.replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._track(rows)

    @property
    def seconds(self) -> float:
        """Training time so far, over all resumes, without the time inside `paused`."""
        return self._trained + time.monotonic() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, `seconds` stands still: for evaluations and checkpoints. Flushes first."""
        self.flush()
        start = time.monotonic()
        try:
            yield
        finally:
            self._started += time.monotonic() - start

    def leave_out(self, seconds: float) -> None:
        """Seconds just spent that are no training time, as those of torch.compile."""
        self._started += seconds

    def step(self, step: int, *, images: int | None = None, **values: Value) -> None:
        """Record one step. Names are those of FIELDS; omitted ones are null.

        `seconds` and `peak_memory` are filled in here, and `images_per_s` and `mfu` where `images`
        of the step are given. May flush. Raises TypeError for another name.
        """
        unknown = set(values) - set(FIELDS)
        if unknown:
            raise TypeError(f"metrics have no field {sorted(unknown)}; the fields are {FIELDS}")
        row: dict[str, Value] = {name: values.get(name) for name in FIELDS}
        row["step"] = step
        self._ends.append((self._mark(), images))
        self._hold(row)

    def evaluation(self, step: int, *, top1: Value, loss: Value, **more: Value) -> None:
        """Record accuracy (a fraction) and mean loss on the evaluation images at `step` steps; and
        `more`: eval_top5; ema_top1 and ema_loss, those of the averaged weights."""
        self.evaluated = step
        self._hold({"step": step, "eval_top1": top1, "eval_loss": loss, **more})

    def _hold(self, row: dict[str, Value]) -> None:
        if self.path is None:
            self._ends.clear()
            return
        # A copy, because the owner of a tensor may write the next step's value into it.
        self._pending.append(
            {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in row.items()}
        )
        late = time.monotonic() - self._flushed >= self._patience
        if late or len(self._pending) >= self._every:
            self.flush()

    def flush(self) -> Row | None:
        """Read pending values from the device, write them, return the newest training line."""
        self._flushed = time.monotonic()
        if self.path is None or not self._pending:
            return self.last
        rows = _read_together(self._pending)
        self._pending = []
        steps = [row for row in rows if "eval_top1" not in row]
        self._time(steps)
        for row in steps:
            self._newest(row)
        rows = [{name: _json(value) for name, value in row.items()} for row in rows]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self._track(rows)
        return self.last

    def _newest(self, row: Row) -> None:
        self.last = row
        self.skips = self.skips + 1 if row.get("skipped") else 0

    def _mark(self) -> Mark:
        """This moment: by the host's clock, or when the device completes the work queued so far."""
        if self._device is None:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _time(self, steps: list[Row]) -> None:
        """Fill in the times of pending steps. The device has completed them."""
        now, here, memory = self.seconds, self._mark(), peak_memory(self._device)
        for row, (end, images) in zip(steps, self._ends, strict=True):
            seconds = now - _between(end, here)
            took, self._completed = seconds - self._completed, seconds
            row["seconds"], row["peak_memory"] = round(seconds, 3), memory
            if images is not None and took > 0:
                row["images_per_s"] = images / took
                if self._share:
                    passes = 2 if row["look"] else 1
                    row["mfu"] = round(images / took * passes * self._share(row["step"]), 5)
        self._ends = []

    def _track(self, rows: list[Row]) -> None:
        if self._tracker is not None:
            for row in rows:
                self._tracker.write(row)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()
        if self._tracker is not None:
            self._tracker.close()


def peak_memory(device: torch.device | None) -> int | None:
    """The most bytes that this process has allocated on its GPU; None on a CPU."""
    on_gpu = device is not None and device.type == "cuda"
    return torch.cuda.max_memory_allocated(device) if on_gpu else None


def read(path: str | os.PathLike[str]) -> tuple[list[Row], list[Row]]:
    """(training lines, evaluations) of a metrics.jsonl, also while a run is writing it.

    Raises RunError for a damaged line other than the last, FileNotFoundError for no file.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no metrics at {path}")
    rows = files.json_lines(Path(path))
    steps = [row for row in rows if "eval_top1" not in row]
    return steps, [row for row in rows if "eval_top1" in row]


def rate(rates: Sequence[float]) -> float | None:
    """That of steps together which have these rates and equal work: the harmonic mean. None of
    none. The arithmetic mean is too high where looks take longer than other steps."""
    return len(rates) / sum(1 / x for x in rates) if rates else None


def _belongs(row: Row, resume_step: int) -> bool:
    """Whether an uninterrupted run would have this line by the time it reaches `resume_step`."""
    if "eval_top1" in row:
        return row["step"] <= resume_step and resume_step > 0
    return row["step"] < resume_step


def _between(start: Mark, end: Mark) -> float:
    """Seconds from one mark to a later one."""
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _read_together(records: list[dict[str, Value]]) -> list[Row]:
    """The records as numbers of the host; one stack and one copy to the host per device."""
    waiting: dict[torch.device, list[Tensor]] = {}
    for record in records:
        for value in record.values():
            if isinstance(value, Tensor):
                waiting.setdefault(value.device, []).append(value.reshape(()))
    read = {}
    for device, values in waiting.items():
        exact = torch.float32 if device.type == "mps" else torch.float64
        read[device] = iter(torch.stack([v.to(exact) for v in values]).tolist())
    return [
        {
            name: _number(name, next(read[value.device]) if isinstance(value, Tensor) else value)
            for name, value in record.items()
        }
        for record in records
    ]


def _number(name: str, value: float | int | bool | None) -> float | int | bool | None:
    if name in _FLAGS and value is not None:
        return bool(value)
    # 9 digits give a float32 back exactly.
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _json(value: float | int | bool | None) -> float | int | bool | None:
    return value if value is None or math.isfinite(value) else None
