"""The runs of a page: which they are, their table, their charts, and the page itself."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..record import jobs
from ..report import about, live
from ..report.page import scripts
from ..report.statistic import many
from .run import Watched

MOST = len(live.COLOURS)  # runs; more colours could not be told apart
_SEARCH_S = 5.0  # between two searches for new runs in the folders


class Board:
    """All that a page shows. Methods may be called by several threads."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._runs: dict[Path, Watched] = {}
        self._found, self._searched = 0, -1.0
        self._charts: live.Live | None = None
        self._version = 0
        self._lock = threading.Lock()

    def answer(self, version: str = "", shape: str = "") -> dict[str, Any]:
        """The newest state, without the data or specification that the asker has already."""
        with self._lock:
            self._refresh()
            charts = self._charts
            assert charts is not None
            answer = self._texts() | {"version": str(self._version), "shape": charts.shape}
            if version != answer["version"] or shape != charts.shape:
                answer |= {"data": charts.data, "last": charts.last}
            if shape != charts.shape:
                answer["spec"] = charts.spec
            return answer

    def read_all(self) -> None:
        """Read until nothing is new: long files are read in parts."""
        with self._lock:
            while self._refresh():
                pass

    def _refresh(self) -> bool:
        found = self._search()
        changed = [run.refresh() for run in self._runs.values()]
        if not any(changed) and not found and self._charts is not None:
            return False
        runs = self._runs.values()
        curves = {name: run.curves() for name, run in zip(self.labels(), runs)}
        colours = dict(zip(curves, live.COLOURS))
        self._charts = live.live(curves, colours, self._charts)
        self._version += 1
        return True

    def _search(self) -> bool:
        """Look for runs in the folders; the newest MOST stay. Returns whether there are others."""
        if self._searched > 0 and time.monotonic() - self._searched < _SEARCH_S:
            return False
        self._searched = time.monotonic()
        before = list(self._runs)
        for folder in self._folders:
            for run in jobs.runs_in(folder) or [folder]:
                self._runs.setdefault(run, Watched(run))
        for folder in self._folders:  # it was empty; now runs have begun in it
            if any(folder in run.parents for run in self._runs):
                self._runs.pop(folder, None)
        self._found = max(self._found, len(self._runs))
        for run in list(self._runs)[:-MOST]:
            del self._runs[run]
        return before != list(self._runs)

    def labels(self) -> list[str]:
        """One a run, all different: by settings where they differ, else the directory."""
        runs = list(self._runs.values())
        known = [run for run in runs if run.config]
        names = iter(about.labels([run.folder for run in known], [run.config for run in known]))
        return [next(names) if run.config else str(run.folder) for run in runs]

    def _texts(self) -> dict[str, Any]:
        runs = list(self._runs.values())
        labels = self.labels()
        shared = about.same([run.config for run in runs])
        title = about.title(shared) or ("" if len(runs) > 1 else labels[0])
        if len(runs) > 1:
            title = f"{len(runs)} runs" + (f": {title}" if title else "")
        facts = [*about.facts(shared), *([str(runs[0].folder)] if len(runs) == 1 else [])]
        notes = []
        if self._found > MOST:
            notes.append(f"The newest {MOST} of {many(self._found, 'run')}; name runs to choose.")
        rows = [
            run.row() | {"label": label, "colour": colour}
            for run, label, colour in zip(runs, labels, live.COLOURS)
        ]
        subtitle = "  ·  ".join(facts)
        below = "Loss, speeds and norms are smoothed over about 2 % of a run."
        if (group := max(run.group for run in runs)) > 1:
            below += f" Each point is a mean of up to {group} steps."
        texts = {"title": title, "subtitle": subtitle, "below": below}
        return texts | {"notes": notes, "runs": rows}


def page(start: dict[str, Any]) -> str:
    """The page that shows the answer `start`; with start["live"] it asks for newer ones."""
    here = Path(__file__)
    script = scripts(here.with_name("page.js").read_text(encoding="utf-8"))
    text = here.with_name("page.html").read_text(encoding="utf-8")
    for name, content in (
        ("policy", _policy(script)), ("script", script), ("start", in_script(start)),
    ):  # fmt: skip
        text = text.replace("{" + name + "}", content, 1)
    return text


def in_script(content: Any) -> str:
    """JSON for a script element: ASCII, and no "<" that could end the element."""
    text = json.dumps(content, allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _policy(script: str) -> str:
    """Only this script runs, and it asks only the server that sent it."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        f"img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
