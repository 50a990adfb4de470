"""Which points of a sweep are done, as the files of its folder say.

OUT/sweep.yaml      the file as it was last read
OUT/tune/NAME/      a trial's run directory, with point.json
OUT/final/NAME/     a final point's
OUT/choices.json    {label: {batch size: the chosen settings, "trials", "score"}}
OUT/table.md        mean top1 by method and batch size
OUT/logs/           output of the runs
OUT/superseded/     runs of settings that the file no longer asks for
"""

import json
import os
import shutil
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .. import checkpoint, files
from ..record import rundir
from .grid import Flags, Grid, Point, settles
from .widen import best_of, edges, next_candidate

_OF_JOB = (  # of a copy's job.json
    *("launcher", "ranks", "commit", "version", "device", "threads", "torch", "started"),
)
_MOST_LINES = 60  # of a copy's metrics


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The trials of one method at one batch size, with their scores; None where not yet done.

    edges: the names whose best value lies at an edge of the grid, and could not be moved beyond it.
    """

    trials: list[Point]
    scores: list[float | None]
    edges: list[str]


class Ledger:
    """The folder of one sweep.

    Args:
        keep: folder with copies of finished points, which then count as done; `keep_copies` fills
            it.
    """

    def __init__(self, grid: Grid, out: Path, keep: Path | None = None) -> None:
        self.grid, self.out, self.keep = grid, out, keep

    def path(self, point: Point) -> Path:
        """The run directory of a point."""
        return self.out / point.name

    def log(self, point: Point) -> Path:
        """The file of its output."""
        return self.out / "logs" / f"{point.name.replace('/', '-')}.txt"

    def summary(self, point: Point) -> dict[str, Any] | None:
        """summary.json of a point that is done with just these settings; else None."""
        for folder in filter(None, (self.out, self.keep)):
            path = folder / point.name
            same = files.json_object(path / rundir.POINT) == point.record()
            if same and (summary := files.json_object(path / rundir.SUMMARY)):
                return summary
        return None

    def keep_copies(self) -> None:
        """Copy what a report needs of every finished point, a few kilobytes, into `keep`."""
        if self.keep is None:
            return
        for point in self.due()[1]:
            path, copy = self.path(point), self.keep / point.name
            here, kept = (
                files.json_object(folder / rundir.POINT) == point.record()
                and (folder / rundir.SUMMARY).exists()
                for folder in (path, copy)
            )
            if here and not kept:
                _copy_run(path, copy)
        for name in ("sweep.yaml", "choices.json", "table.md"):
            if (self.out / name).exists():
                files.replace_text(self.keep / name, (self.out / name).read_text())

    def prepare(self, point: Point) -> str | None:
        """Make the run directory ready for a start; returns a note for the user.

        A run of other settings is moved to superseded/. One without a checkpoint starts anew.
        """
        path, note = self.path(point), None
        before = files.json_object(path / rundir.POINT)
        if before is not None and before != point.record():
            aside = self.out / "superseded" / point.name
            aside.parent.mkdir(parents=True, exist_ok=True)
            aside = files.first_free(f"{aside}.")
            os.rename(path, aside)
            files.replace_json(aside / rundir.POINT, {**before, "stage": "superseded"})
            note = f"{point.name} was of other settings; it is now in superseded/"
        elif path.exists() and not checkpoint.found(path / "checkpoints"):
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        files.replace_json(path / rundir.POINT, point.record())
        return note

    def chosen(self) -> dict[tuple[str, int], Flags]:
        """The best candidate by held-out top1 of every method and batch size whose trials are done.

        The first in the file's order where several are equally good.
        """
        return self._choices()[0]

    def save_choices(self) -> None:
        """Write choices.json, if there is a choice."""
        if rows := self._choices()[1]:
            files.replace_json(self.out / "choices.json", rows)

    def _choices(self) -> tuple[dict[tuple[str, int], Flags], dict[str, dict[str, Any]]]:
        chosen: dict[tuple[str, int], Flags] = {}
        rows: dict[str, dict[str, Any]] = {}
        for label, batch_size in self._tuned():
            tuning = self.tuning(label, batch_size)
            scores = [score for score in tuning.scores if score is not None]
            if len(scores) < len(tuning.trials):
                continue
            best = tuning.trials[best_of(scores)].tuned
            chosen[label, batch_size] = best
            rows.setdefault(label, {})[str(batch_size)] = {
                **best,
                "trials": len(scores),
                "score": max(scores),
                **({"at_edge": tuning.edges} if tuning.edges and self.grid.widen else {}),
            }
        return chosen, rows

    def _tuned(self) -> list[tuple[str, int]]:
        """(label, batch size) of all trials, method by method at one size, then the next."""
        sizes = self.grid.tuned_at if self.grid.candidates else []
        return [(label, size) for size in sizes for label in self.grid.methods]

    def tuning(self, label: str, batch_size: int) -> Tuning:
        """The trials of the file, and those added since the best lay at an edge of the grid."""

        def allowed(flags: Flags) -> bool:
            """Whether such a run can be: an edge may be that of what a setting may be."""
            trial = self.grid.trial(label, batch_size, flags)
            return int(flags.get("m", 1)) <= batch_size and settles(trial)

        tried = list(self.grid.candidates[label])
        most = len(tried) + self.grid.widen
        while True:
            trials = [self.grid.trial(label, batch_size, flags) for flags in tried]
            scores = [self._score(trial) for trial in trials]
            known = [score for score in scores if score is not None]
            if len(known) < len(scores):
                return Tuning(trials=trials, scores=scores, edges=[])
            more = next_candidate(tried, known, allowed) if len(tried) < most else None
            if more is None:
                return Tuning(trials=trials, scores=scores, edges=edges(tried, known))
            tried.append(more)

    @property
    def total(self) -> int:
        """Points in all, as far as known: more trials may be added."""
        added = [
            len(self.tuning(*at).trials) - len(self.grid.candidates[at[0]]) for at in self._tuned()
        ]
        return self.grid.total + sum(added)

    def _score(self, trial: Point) -> float | None:
        summary = self.summary(trial)
        if summary is None:
            return None
        top1 = summary["top1"]
        return float(top1) if top1 is not None and isfinite(top1) else 0.0

    def due(self) -> tuple[list[Point], list[Point]]:
        """(points that can run now, in order; points that are done).

        Method by method in the file's order, a method's trials first, so that the first methods of
        a long study have their answer before the trials of the last begin.
        """
        trials = [trial for at in self._tuned() for trial in self.tuning(*at).trials]
        finals = list(self.grid.finals(self.chosen()))
        order = list(self.grid.methods)
        points = sorted(trials + finals, key=lambda p: order.index(p.label))  # stable
        done = [p for p in points if self.summary(p) is not None]
        names = {p.name for p in done}
        return [p for p in points if p.name not in names], done

    def table(self) -> str:
        """Markdown: mean top1 in percent +- standard deviation over seeds (how many). Saved."""
        sizes = self.grid.batch_sizes
        lines = [
            "| method | " + " | ".join(map(str, sizes)) + " |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        finals = list(self.grid.finals(self.chosen()))
        for label in self.grid.methods:
            cells = []
            for size in sizes:
                points = [p for p in finals if p.label == label and p.batch_size == size]
                top1 = [s["top1"] for p in points if (s := self.summary(p)) is not None]
                spread = f" ± {100 * stdev(top1):.2f}" if len(top1) > 1 else ""
                cells.append(f"{100 * mean(top1):.2f}{spread} ({len(top1)})" if top1 else "-")
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        self.save_choices()
        text = "\n".join(lines) + "\n"
        files.replace_text(self.out / "table.md", text)
        return text


def _copy_run(path: Path, copy: Path) -> None:
    """A run without weights, checkpoints and most lines of its metrics, and without names of this
    machine and of its folders. Replaces a copy of other settings. The summary, which marks a whole
    copy, goes first and comes last."""
    copy.mkdir(parents=True, exist_ok=True)
    (copy / rundir.SUMMARY).unlink(missing_ok=True)
    config = (path / rundir.CONFIG).read_text().splitlines(keepends=True)
    own = "".join(line for line in config if not line.startswith("out: "))
    files.replace_text(copy / rundir.CONFIG, own)
    job = rundir.job(path)
    files.replace_json(copy / rundir.JOB, {name: job.get(name) for name in _OF_JOB})
    files.replace_text(copy / rundir.POINT, (path / rundir.POINT).read_text())
    lines = (path / rundir.METRICS).read_text().splitlines(keepends=True)
    files.replace_text(copy / rundir.METRICS, "".join(_thinned(lines)))
    files.replace_text(copy / rundir.SUMMARY, (path / rundir.SUMMARY).read_text())


def _thinned(lines: list[str]) -> list[str]:
    """About _MOST_LINES lines: evenly spaced looks, and others; evaluations, the last line and all
    skipped steps, which a report counts, are complete."""
    rows = [json.loads(line) for line in lines]
    looks = [i for i, row in enumerate(rows) if row.get("look")]
    others = [i for i, row in enumerate(rows) if row.get("look") is False]
    every = [i for i, row in enumerate(rows) if "look" not in row or row.get("skipped")]
    chosen = {*every, *range(len(rows))[-1:]}
    for places in (looks, others):
        chosen |= {*places[:: max(1, 2 * len(places) // _MOST_LINES)]}
    return [lines[i] for i in sorted(chosen)]
