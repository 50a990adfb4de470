"""Which points of a sweep are done, as the files of its folder say.

OUT/sweep.yaml      the file as it was last read
OUT/tune/NAME/      a trial's run directory, with point.json
OUT/final/NAME/     a final point's
OUT/choices.json    {label: {batch size: the chosen settings, "trials", "score"}}
OUT/table.md        mean top1 by method and batch size
OUT/logs/           output of the runs
OUT/superseded/     runs of settings that the file no longer asks for
"""

import os
import shutil
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .. import checkpoint, files
from ..record import rundir
from .grid import Flags, Grid, Point


class Ledger:
    """The folder of one sweep."""

    def __init__(self, grid: Grid, out: Path) -> None:
        self.grid, self.out = grid, out

    def path(self, point: Point) -> Path:
        """The run directory of a point."""
        return self.out / point.name

    def log(self, point: Point) -> Path:
        """The file of its output."""
        return self.out / "logs" / f"{point.name.replace('/', '-')}.txt"

    def summary(self, point: Point) -> dict[str, Any] | None:
        """summary.json of a point that is done with just these settings; else None."""
        if files.json_object(self.path(point) / rundir.POINT) != point.record():
            return None
        return files.json_object(self.path(point) / rundir.SUMMARY)

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

        The first in the file's order where several are equally good. Writes choices.json.
        """
        chosen: dict[tuple[str, int], Flags] = {}
        rows: dict[str, dict[str, Any]] = {}
        for label in self.grid.methods:
            for batch_size in self.grid.tuned_at if self.grid.candidates else []:
                trials = self.grid.trials(label, batch_size)
                scores = [self._score(t) for t in trials]
                if None in scores:
                    continue
                best = max(range(len(trials)), key=lambda i: (scores[i], -i))
                chosen[label, batch_size] = trials[best].tuned
                rows.setdefault(label, {})[str(batch_size)] = {
                    **trials[best].tuned,
                    "trials": len(trials),
                    "score": scores[best],
                }
        if rows:
            files.replace_json(self.out / "choices.json", rows)
        return chosen

    def _score(self, trial: Point) -> float | None:
        summary = self.summary(trial)
        if summary is None:
            return None
        top1 = summary["top1"]
        return float(top1) if top1 is not None and isfinite(top1) else 0.0

    def due(self) -> tuple[list[Point], list[Point]]:
        """(points that can run now, in order; points that are done). Trials come first."""
        trials = list(self.grid.all_trials())
        finals = list(self.grid.finals(self.chosen()))
        done = [p for p in trials + finals if self.summary(p) is not None]
        names = {p.name for p in done}
        return [p for p in trials + finals if p.name not in names], done

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
        text = "\n".join(lines) + "\n"
        files.replace_text(self.out / "table.md", text)
        return text
