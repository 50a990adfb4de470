"""`dist-looksam report`: everything that a set of runs says, as files and on the terminal."""

import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from dist_looksam import __version__
from dist_looksam.report import drawing, scaling, tables, trials
from dist_looksam.report.answer import answer
from dist_looksam.report.page import Section, page
from dist_looksam.report.reference import Reference
from dist_looksam.report.runs import FINAL, TUNE, Found, Run, find
from dist_looksam.report.study import Study, study
from dist_looksam.report.tables import Table
from dist_looksam.report.tuning import Tuning, tunings, warnings


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written, and its words."""

    text: str  # Markdown: answer, notes, tables
    paths: list[Path]


def report(
    folders: Sequence[str],
    *,
    out: Path,
    points: float = 1.0,
    references: Sequence[Reference] = (),
    command: Sequence[str] = (),
) -> Report:
    """Compare the runs below `folders`; writes pictures, index.html, report.md, report.csv.

    points: how many % below its own best mean counts as a fall. command: what the user typed.
    Raises ConfigError where there are no runs, RunError where `out` cannot be written.
    """
    found = find(folders)
    seen = study(found)
    tuned = tunings(found, [label.name for label in seen.labels])
    seen.notes += _not_begun(found) + warnings(tuned)
    out.mkdir(parents=True, exist_ok=True)
    words = answer(seen, points) if seen.cells else "No final run has finished yet."
    shown = _tables(seen, tuned, points)
    paths = _pictures(seen, found, tuned, out)
    paths.append(_write(out / "report.csv", tables.to_csv(found.runs)))
    text = _markdown(words, seen.notes, shown + [r.table() for r in references])
    paths.append(_write(out / "report.md", text))
    html = page(
        title=_title(seen),
        subtitle=_subtitle(seen, found),
        facts=_facts(command, found),
        answer=words,
        notes=seen.notes,
        sections=_sections(seen, found, tuned, points, references),
    )
    paths.append(_write(out / "index.html", html))
    return Report(text=text, paths=paths)


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _tables(seen: Study, tuned: list[Tuning], points: float) -> list[Table]:
    if not seen.cells:
        return [tables.tuning(tuned)] if tuned else []
    shown = [tables.accuracy(seen), tables.cost(seen, points), tables.seconds(seen)]
    if lines := scaling.series(seen.finals):
        shown.append(tables.ranks(lines))
    return shown + ([tables.tuning(tuned)] if tuned else [])


def _markdown(words: str, notes: Sequence[str], shown: Sequence[Table]) -> str:
    listed = "".join(f"- {note}\n" for note in notes)
    parts = [words + "\n", listed, *(table.markdown() for table in shown)]
    return "\n".join(part for part in parts if part)


def _pictures(seen: Study, found: Found, tuned: list[Tuning], out: Path) -> list[Path]:
    paths = []
    if seen.cells:
        chart = scaling.picture(seen, _title(seen), [_subtitle(seen, found), scaling.spread(seen)])
        paths.append(drawing.save_png(chart, out / "scaling.png"))
    if lines := scaling.series(seen.finals):
        paths.append(drawing.save_png(scaling.ranks(lines, seen).chart(), out / "ranks.png"))
    tried = trials.chart(tuned)
    if tried is not None:
        paths.append(drawing.save_png(tried, out / "tuning.png"))
    return paths


def _sections(
    seen: Study, found: Found, tuned: list[Tuning], points: float, references: Sequence[Reference]
) -> list[Section]:
    sections = []
    if seen.cells:
        main = scaling.accuracy(seen, width=840, height=430, hover=True).chart()
        spread = f"{scaling.spread(seen)}. Crosses: runs in trouble."
        table = tables.accuracy(seen)
        sections.append(Section(title="Accuracy", text=spread, charts=[main], tables=[table]))
        others = scaling.lesser(seen, width=270, height=220, hover=True)
        small = [panel.chart() for panel in others]
        both = [tables.cost(seen, points), tables.seconds(seen)]
        sections.append(Section(title="Cost", charts=small, tables=both))
    if lines := scaling.series(seen.finals):
        chart = scaling.ranks(lines, seen, hover=True).chart()
        sections.append(Section(title="Ranks", charts=[chart], tables=[tables.ranks(lines)]))
    if tuned:
        tried = trials.chart(tuned)
        charts = [] if tried is None else [tried]
        table = tables.tuning(tuned)
        sections.append(Section(title="Tuning", charts=charts, tables=[table]))
    if found.grids:
        sections.append(Section(title="What was run", folded=found.grids))
    for reference in references:
        sections.append(
            Section(
                title="Figures of others",
                text="Second-hand, of other data and models: not comparable with the runs above.",
                tables=[reference.table()],
                second_hand=True,
            )
        )
    return sections


def _title(seen: Study) -> str:
    data = _common(seen.finals, "data")
    return "Accuracy against batch size" + (f", {data}" if data else "")


def _common(runs: Sequence[Run], name: str) -> str | None:
    """A setting that all runs share; None where they differ."""
    values = {str(run.setting(name)) for run in runs if run.setting(name) is not None}
    return values.pop() if len(values) == 1 else None


def _subtitle(seen: Study, found: Found) -> str:
    seeds = {run.seed for run in seen.finals}
    facts = [
        _many(len(seen.labels), "method"),
        _many(len(seen.batches), "batch size"),
        _many(len(seeds), "seed"),
        _many(len(seen.finals), "finished run"),
    ]
    trials = sum(run.stage == TUNE for run in found.runs)
    facts += [_many(trials, "tuning trial")] if trials else []
    facts += [f"{len(seen.unfinished)} unfinished"] if seen.unfinished else []
    model = _common(seen.finals, "model")
    return " · ".join([*([model] if model and model != "auto" else []), *facts])


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _not_begun(found: Found) -> list[str]:
    """Final points that a sweep.yaml asks for and that have no folder yet."""
    there = {(run.label, run.batch, run.seed) for run in found.runs if run.stage == FINAL}
    notes = []
    for path, text in found.grids.items():
        try:
            grid = yaml.safe_load(text)
            asked = [
                (str(label), int(batch), int(seed))
                for label in grid["methods"]
                for batch in _several(grid["batch_size"])
                for seed in _several(grid.get("seeds", 0))
            ]
        except (TypeError, KeyError, ValueError, AttributeError, yaml.YAMLError):
            continue  # not a sweep's own form: its text is shown, nothing is known of its points
        missing = [point for point in asked if point not in there]
        if missing:
            label, batch, seed = missing[0]
            notes.append(
                f"{len(missing)} of {len(asked)} final runs that {path} asks for have not begun, "
                f"the first {label}, batch {batch:,}, seed {seed}."
            )
    return notes


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _facts(command: Sequence[str], found: Found) -> dict[str, str]:
    """The page's header: what was run, of which commit, where, with what, when."""
    hosts = {run.host for run in found.runs if run.host}
    facts = {
        "report": shlex.join(command),
        "runs": ", ".join(found.grids) or "single runs",
        "commit": _commit() or "not known",
        "this machine": _machine(),
        "runs were on": _many(len(hosts), "machine") if hosts else "not known",
        "versions": ", ".join(f"{name} {v}" for name, v in _versions().items()),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return {name: text for name, text in facts.items() if text}


def _commit() -> str | None:
    """The commit of the checkout this package is in, and whether it was changed since."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = " with local changes" if git("status", "--porcelain", "-uno") else ""
    except OSError:  # no git here
        return None
    return f"{commit}{changed}" if commit else None


def _machine() -> str:
    model = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:  # not Linux
        pass
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{model}, {torch.multiprocessing.cpu_count()} cores", *gpus])


def _versions() -> dict[str, str]:
    found = {
        "dist_looksam": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("deepspeed", "horovod"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
