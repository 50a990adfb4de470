"""`dist-looksam report`: compares runs, in files and on the terminal."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from dist_looksam.record.version import made_with
from dist_looksam.report import drawing, flatness, ranking, scaling, tables, trials
from dist_looksam.report.page import Section, page
from dist_looksam.report.runs import FINAL, TUNE, Run, RunSet, find, to_csv
from dist_looksam.report.statistic import many
from dist_looksam.report.study import Study, study
from dist_looksam.report.tables import Table
from dist_looksam.report.tuning import Tuning, tunings, warnings
from dist_looksam.settings import share


@dataclass(frozen=True, kw_only=True)
class Report:
    """The written files, and the printed text."""

    text: str  # Markdown: notes and tables
    paths: list[Path]


def report(
    folders: Sequence[str],
    *,
    out: Path,
    points: float = 1.0,
    references: Sequence[Table] = (),
    command: Sequence[str] = (),
) -> Report:
    """Compare the runs below `folders`; writes pictures, index.html, report.md, report.csv.

    points: fall below the best mean, in %, that ends a method's range. command: as it was typed.
    Raises ConfigError where there are no runs, RunError where `out` cannot be written.
    """
    run_set = find(folders)
    results = study(run_set)
    tuned = tunings(run_set, [label.name for label in results.labels])
    results.notes += _beside_grids(run_set) + warnings(tuned)
    out.mkdir(parents=True, exist_ok=True)
    if not results.cells:
        results.notes.insert(0, "No final run has finished yet.")
    sections = _sections(results, run_set, tuned, points, references)
    paths = _pictures(results, run_set, tuned, out)
    paths.append(_write(out / "report.csv", to_csv(run_set.runs)))
    listed = "".join(f"- {note}\n" for note in results.notes)
    shown = [table.markdown() for section in sections for table in section.tables]
    text = "\n".join([*([listed] if listed else []), *shown])
    paths.append(_write(out / "report.md", text))
    html = page(
        title=_title(results),
        subtitle=_subtitle(results, run_set),
        facts=_facts(command, run_set),
        notes=results.notes,
        sections=sections,
    )
    paths.append(_write(out / "index.html", html))
    return Report(text=text, paths=paths)


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _pictures(results: Study, run_set: RunSet, tuned: list[Tuning], out: Path) -> list[Path]:
    paths = []
    if results.cells:
        chart = scaling.picture(
            results, _title(results), [_subtitle(results, run_set), scaling.spread(results)]
        )
        paths.append(drawing.save_png(chart, out / "scaling.png"))
    if lines := scaling.series(results):
        paths.append(drawing.save_png(scaling.ranks(lines, results).chart(), out / "ranks.png"))
    tried = trials.chart(tuned)
    if tried is not None:
        paths.append(drawing.save_png(tried, out / "tuning.png"))
    if flat := flatness.read([run.folder for run in results.finals]):
        paths.append(drawing.save_png(flatness.picture(flat), out / "flatness.png"))
    return paths


def _sections(
    results: Study,
    run_set: RunSet,
    tuned: list[Tuning],
    points: float,
    references: Sequence[Table],
) -> list[Section]:
    sections = []
    if results.cells:
        if len(results.batches) == 1:
            main = ranking.chart(results, width=700)
        else:
            main = scaling.accuracy(results, width=840, height=430, hover=True).chart()
        spread = f"{scaling.spread(results)}. Crosses: runs in trouble."
        shown = [tables.accuracy(results), tables.differences(results)]
        both = [table for table in shown if table]
        sections.append(Section(title="Accuracy", text=spread, charts=[main], tables=both))
        others = scaling.lesser(results, width=270, height=220, hover=True)
        small = [panel.chart() for panel in others]
        both = [tables.cost(results, points), *[tables.seconds(results)] * results.quiet]
        sections.append(Section(title="Cost", charts=small, tables=both))
    if lines := scaling.series(results):
        chart = scaling.ranks(lines, results, hover=True).chart()
        sections.append(Section(title="Ranks", charts=[chart], tables=[tables.ranks(lines)]))
    if flat := flatness.read([run.folder for run in results.finals]):
        picture, table = flatness.picture(flat), flatness.as_table(flat)
        sections.append(Section(title="Flatness", charts=[picture], tables=[table]))
    if tuned:
        tried = trials.chart(tuned)
        charts = [] if tried is None else [tried]
        table = tables.tuning(tuned)
        sections.append(Section(title="Tuning", charts=charts, tables=[table]))
    if run_set.grids:
        sections.append(Section(title="What was run", folded=run_set.grids))
    for reference in references:
        sections.append(
            Section(
                title="Figures of others",
                text="Second-hand, of other data and models: not comparable with the runs above.",
                tables=[reference],
                second_hand=True,
            )
        )
    return sections


def _title(results: Study) -> str:
    data = _common(results.finals, "data")
    several = len(results.batches) != 1
    what = "against batch size" if several else f"at batch size {results.batches[0]:,}"
    return f"Accuracy {what}" + (f", {data}" if data else "")


def _common(runs: Sequence[Run], name: str) -> str | None:
    """The value of a setting that all runs share; None where they differ."""
    values = {str(run.setting(name)) for run in runs if run.setting(name) is not None}
    return values.pop() if len(values) == 1 else None


def _subtitle(results: Study, run_set: RunSet) -> str:
    seeds = {run.seed for run in results.finals}
    facts = [
        many(len(results.labels), "method"),
        many(len(results.batches), "batch size"),
        many(len(seeds), "seed"),
        many(len(results.finals), "finished run"),
    ]
    trials = sum(run.stage == TUNE for run in run_set.runs)
    facts += [many(trials, "tuning trial")] if trials else []
    facts += [f"{len(results.unfinished)} unfinished"] if results.unfinished else []
    model = _common(results.finals, "model")
    return " · ".join([*([model] if model and model != "auto" else []), *facts])


def _beside_grids(run_set: RunSet) -> list[str]:
    """Notes on final points of a sweep.yaml without a run directory, and on runs in its folder that
    it does not ask for."""
    finals = [run for run in run_set.runs if run.stage == FINAL]
    there = {(run.label, run.batch, run.seed) for run in finals}
    notes = []
    for path, text in run_set.grids.items():
        try:
            grid = yaml.safe_load(text)
            asked = [
                (str(label), int(batch), int(seed))
                for label in grid["methods"]
                for batch in _batches(grid)
                for seed in _several(grid.get("seeds", 0))
            ]
        except (TypeError, KeyError, ValueError, AttributeError, yaml.YAMLError):
            continue  # not a valid sweep: its text is shown
        missing = [point for point in asked if point not in there]
        if missing:
            label, batch, seed = missing[0]
            notes.append(
                f"{len(missing)} of {len(asked)} final runs that {path} asks for have not begun, "
                f"the first {label}, batch {batch:,}, seed {seed}."
            )
        own = Path(path).parent / FINAL
        old = [run for run in finals if own in Path(run.folder).parents]
        old = [run for run in old if (run.label, run.batch, run.seed) not in asked]
        if old:
            notes.append(
                f"{many(len(old), 'run')} that {path} no longer asks for, the first "
                f"{old[0].folder}: shown with the others; move what you do not want out of {own}."
            )
    return notes


def _batches(grid: dict[str, Any]) -> list[Any]:
    if "imagenet_batch" not in grid:
        return _several(grid["batch_size"])
    return share.batches(
        _several(grid["imagenet_batch"]),
        images=grid["settings"]["train_images"],
        multiple=grid.get("batch_multiple", 1),
    )


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _facts(command: Sequence[str], run_set: RunSet) -> dict[str, str]:
    """The page's header: command, runs, their commits and machines, version of this package."""
    hosts = {run.host for run in run_set.runs if run.host}
    commits = Counter(run.commit or "not recorded" for run in run_set.runs)
    several = ", ".join(f"{name} ({many(n, 'run')})" for name, n in commits.items())
    own = made_with()
    return {
        "command": shlex.join(command),
        "runs": ", ".join(run_set.grids) or "single runs",
        "commit of the runs": next(iter(commits)) if len(commits) == 1 else several,
        "runs were on": many(len(hosts), "machine") if hosts else "not known",
        "page made on": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "page made by": f"dist_looksam {own['version']}, commit {own['commit'] or 'not known'}",
    }
