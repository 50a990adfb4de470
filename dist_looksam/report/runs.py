"""Finds the runs and sweeps in folders, and reads their files.

A run is a folder with config.yaml (or a sweep's point.json), metrics.jsonl and, when it is done,
summary.json. A sweep's folder has sweep.yaml, and choices.json with the settings that tuning chose.
"""

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dist_looksam.errors import ConfigError, RunError
from dist_looksam.optim.table import METHODS
from dist_looksam.record import metrics, rundir

FINISHED, UNFINISHED, DIVERGED = "finished", "unfinished", "diverged"
FINAL, TUNE, SUPERSEDED = "final", "tune", "superseded"  # the last: of settings a sweep dropped
_SKIPPED_SHARE = 0.1  # of a run's steps; more is reported
_NO_SETTINGS = ("trials", "score", "at_edge")  # of choices.json
_TUNABLE = ("lr", "weight_decay", "rho", "k", "alpha")
_TEXTS = (  # columns that are no numbers
    "folder", "label", "method", "base", "stage", "state", "reuse", "data", "model", "host",
    "commit",
)  # fmt: skip
_COLUMNS = (
    "folder", "label", "method", "base", "stage", "batch", "seed", "state", "world_size", "top1",
    "steps", "seconds", "images_per_s", "passes", "gv_ratio", "skipped", "holdout", "lr", "rho",
    "k", "alpha", "reuse", "weight_decay", "warmup_steps", "trouble", "data", "model", "host",
    "commit", "mfu", "peak_memory", "started",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory. Unknown values are None."""

    folder: str  # as the user would type it
    label: str
    method: str
    base: str
    stage: str
    batch: int
    seed: int
    state: str  # finished, unfinished, or diverged: done, but its last loss was not finite
    world_size: int | None = None
    top1: float | None = None  # a fraction
    steps: int | None = None
    seconds: float | None = None
    images_per_s: float | None = None
    mfu: float | None = None  # a fraction; of runs on known GPUs
    peak_memory: int | None = None  # bytes, of rank 0's GPU
    passes: int | None = None
    gv_ratio: float | None = None  # median over the looks of the run
    skipped: int = 0  # steps
    tuned: dict[str, Any] = field(default_factory=dict)  # settings that tuning tried or chose
    config: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0
    host: str | None = None
    commit: str | None = None  # of the checkout it was made with, else the package's version

    def setting(self, name: str) -> Any:
        """The tuned value, else that of config.yaml; None if the method does not use it."""
        row = METHODS[self.method]
        has = {
            "rho": row.ascent,
            "k": row.settable_k,
            "alpha": row.alpha is not None,
            "reuse": row.reuses_gv,
        }
        if not has.get(name, True):
            return None
        return self.tuned.get(name, self.config.get(name))

    @property
    def final(self) -> bool:
        """Whether it is neither a trial nor superseded."""
        return self.stage == FINAL

    @property
    def holdout(self) -> int:
        """Number of training images that it was evaluated on; 0: the test images."""
        return int(self.config.get("holdout") or 0)

    @property
    def counts(self) -> bool:
        """Whether its accuracy counts in a mean."""
        return self.state != UNFINISHED and self.top1 is not None

    @property
    def trouble(self) -> str:
        """A warning about this run's accuracy; empty where all went well."""
        if self.state == DIVERGED:
            return "its last loss was not finite" if self.top1 is not None else "has no accuracy"
        if self.steps and self.skipped > _SKIPPED_SHARE * self.steps:
            return f"{self.skipped:,} of {self.steps:,} steps were skipped"
        return ""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The settings that a sweep chose for one (label, batch), the number of trials, the score."""

    flags: dict[str, Any]
    trials: int | None
    score: float | None
    path: str  # of choices.json


@dataclass(kw_only=True)
class RunSet:
    """All runs and sweeps below the folders of a report."""

    runs: list[Run] = field(default_factory=list)
    choices: dict[tuple[str, int], Choice] = field(default_factory=dict)
    grids: dict[str, str] = field(default_factory=dict)  # sweep.yaml's path -> its text
    notes: list[str] = field(default_factory=list)


def find(folders: Sequence[str]) -> RunSet:
    """Every run and sweep below `folders`, and the runs of report.csv files among `folders`.

    Raises ConfigError where there is no run.
    """
    run_set = RunSet()
    visited: set[str] = set()
    for root in folders:
        if Path(root).suffix == ".csv" and Path(root).is_file():
            run_set.runs += read_csv(Path(root))
            _take(Path(root).parent, run_set)
            continue
        if not Path(root).is_dir():
            raise ConfigError(f"a report needs folders that hold runs, got {root}: no such folder.")
        for folder in _walk(root, visited):
            _take(folder, run_set)
    if not run_set.runs:
        raise ConfigError(
            f"a report needs folders that hold runs (config.yaml, metrics.jsonl, summary.json), "
            f"got {', '.join(map(str, folders))} with none in it; give what train.py --out or "
            f"dist-looksam sweep wrote."
        )
    return run_set


def _walk(root: str, visited: set[str]) -> Iterator[Path]:
    """Folders with a run or a sweep, each once, also through links."""
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        is_run = rundir.CONFIG in names or rundir.POINT in names
        hidden = {name for name in below if name.startswith(".")}
        below[:] = [] if is_run or real in visited else sorted(set(below) - hidden)
        if real not in visited and (is_run or {"sweep.yaml", "choices.json"} & set(names)):
            yield Path(folder)
        visited.add(real)


def _take(folder: Path, run_set: RunSet) -> None:
    if (folder / rundir.CONFIG).exists() or (folder / rundir.POINT).exists():
        try:
            run_set.runs.append(_read(folder))
        except (ValueError, TypeError, LookupError, AttributeError, OSError, yaml.YAMLError,
                RunError) as error:  # fmt: skip
            text = " ".join(str(error).split())
            run_set.notes.append(f"{folder} could not be read and is left out: {text}")
        return
    if (folder / "sweep.yaml").exists():
        run_set.grids[str(folder / "sweep.yaml")] = (folder / "sweep.yaml").read_text()
    if (folder / "choices.json").exists():
        chosen = _choices(folder / "choices.json", run_set.notes)
        run_set.notes += _chosen_twice(run_set.choices, chosen)
        run_set.choices |= chosen


def _chosen_twice(
    before: dict[tuple[str, int], Choice], chosen: dict[tuple[str, int], Choice]
) -> list[str]:
    """A sentence for each pair of sweeps that tuned the same label at the same batch."""
    twice: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for at in sorted(before.keys() & chosen.keys()):
        twice.setdefault((before[at].path, chosen[at].path), []).append(at)
    notes = []
    for (old, new), where in twice.items():
        label, batch = where[0]
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        notes.append(
            f"{old} and {new} both chose for {label}, batch {batch:,}{more}: what the latter chose "
            f"is shown, and the trials and runs of both are taken together. Give different labels, "
            f"or make a report of each."
        )
    return notes


def _choices(path: Path, notes: list[str]) -> dict[tuple[str, int], Choice]:
    chosen = {}
    try:
        for label, batches in json.loads(path.read_text()).items():
            for batch, row in batches.items():
                flags = {name: value for name, value in row.items() if name not in _NO_SETTINGS}
                chosen[label, int(batch)] = Choice(
                    flags=flags,
                    trials=row.get("trials"),
                    score=row.get("score"),
                    path=str(path),
                )
    except (ValueError, AttributeError) as error:
        notes.append(f"{path} could not be read and is left out: {error}")
    return chosen


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _yaml(path: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return (yaml.load(path.read_text(), loader) or {}) if path.exists() else {}


def _read(folder: Path) -> Run:
    config, point = _yaml(folder / rundir.CONFIG), _json(folder / rundir.POINT)
    end, job = _json(folder / rundir.SUMMARY), rundir.job(folder)
    method = point.get("method") or end.get("optimizer") or config["optimizer"]
    if method not in METHODS:
        raise ValueError(f"optimizer must be one of {', '.join(METHODS)}, got {method!r}")
    base = config.get("base") or METHODS[method].base
    own = method if base == METHODS[method].base else f"{method} on {base}"
    steps = metrics.read(folder / rundir.METRICS)[0] if end else []
    top1 = _finite(end.get("top1"))
    lost = bool(end) and (top1 is None or bool(steps and steps[-1]["loss"] is None))
    looks = [row["gv_ratio"] for row in steps if row["look"] and row["gv_ratio"] is not None]
    version = job.get("version")
    return Run(
        folder=str(folder),
        label=str(point.get("label") or own),
        method=method,
        base=base,
        stage=point.get("stage", FINAL),
        batch=int(point.get("batch_size") or config["batch_size"]),
        seed=int(point["seed"] if "seed" in point else config["seed"]),
        state=UNFINISHED if not end else DIVERGED if lost else FINISHED,
        world_size=end.get("world_size") or job.get("ranks"),
        top1=top1,
        steps=end.get("steps"),
        seconds=_finite(end.get("seconds")),
        images_per_s=_finite(end.get("images_per_s")),
        mfu=_finite(end.get("mfu")),
        peak_memory=end.get("peak_memory"),
        passes=end.get("forward_backward_passes"),
        gv_ratio=statistics.median(looks) if looks else None,
        skipped=sum(bool(row["skipped"]) for row in steps),
        tuned=point.get("tuned", point.get("flags")) or {},
        config={**(point.get("flags") or {}), **config},
        started=float(job.get("started") or 0.0),
        host=job.get("host"),
        commit=job.get("commit") or (f"dist_looksam {version}" if version else None),
    )


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def to_csv(runs: Sequence[Run]) -> str:
    """All runs, trials and unfinished ones too, a line each; unknown values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for run in sorted(runs, key=lambda r: (r.stage, r.label, r.batch, r.seed, r.folder)):
        writer.writerow(
            getattr(run, name) if hasattr(run, name) else run.setting(name) for name in _COLUMNS
        )
    return text.getvalue()


def read_csv(path: Path) -> list[Run]:
    """The runs of a report.csv. Raises ConfigError if it is not one."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            runs = [_of_line(line) for line in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"a CSV of runs must be the report.csv of a report, got {path} ({error!r})."
        ) from None
    trials = [run for run in runs if run.stage == TUNE]
    varied: dict[tuple[str, int, str], set[Any]] = {}
    for run in trials:
        for name in _TUNABLE:
            varied.setdefault((run.label, run.batch, name), set()).add(run.setting(name))
    for run in trials:
        names = [n for n in _TUNABLE if len(varied[run.label, run.batch, n]) > 1]
        run.tuned.update((name, run.setting(name)) for name in names)
    return runs


def _of_line(line: dict[str, str]) -> Run:
    known = {n: line[n] for n in _COLUMNS if n != "trouble" and line.get(n)}
    values: dict[str, Any] = {
        n: text if n in _TEXTS else json.loads(text) for n, text in known.items()
    }
    if values["method"] not in METHODS:
        raise ValueError(f"method {values['method']}")
    own = {n: values.pop(n) for n in Run.__dataclass_fields__ if n in values}
    return Run(**own, config=values)
