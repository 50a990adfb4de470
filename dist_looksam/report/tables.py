"""The report's tables, once, as Markdown for a paper and as HTML; and report.csv, a run a line."""

import csv
import html
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dist_looksam.report.runs import Run
from dist_looksam.report.study import FEWEST, Amount, Label, Study
from dist_looksam.report.tuning import Tuning

NONE = "-"


@dataclass(frozen=True, kw_only=True)
class Text:
    """The words of one table cell."""

    text: str
    bold: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, a sentence on how to read it, a head and rows; the first column is names."""

    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Text]]

    def markdown(self) -> str:
        """GitHub's form of a table, its columns aligned for the terminal too."""
        cells = [[f"**{c.text}**" if c.bold else c.text for c in row] for row in self.rows]
        cells = [[text.replace("|", "\\|") for text in row] for row in cells]
        grid = [list(self.head), *cells]
        width = [max(3, *(len(row[i]) for row in grid)) for i in range(len(self.head))]
        lines = [
            "| "
            + " | ".join(x.ljust(w) if not i else x.rjust(w) for i, (x, w) in enumerate(row))
            + " |"
            for row in ((zip(r, width)) for r in grid)
        ]
        rule = ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])]
        lines.insert(1, "| " + " | ".join(rule) + " |")
        return f"**{self.title}.** {self.caption}\n\n" + "\n".join(lines) + "\n"

    def html(self) -> str:
        """The same for the page."""
        head = "".join(f"<th>{html.escape(text)}</th>" for text in self.head)
        body = "".join(
            "<tr>"
            + "".join(
                f"<td>{'<b>' if c.bold else ''}{html.escape(c.text)}{'</b>' if c.bold else ''}</td>"
                for c in row
            )
            + "</tr>\n"
            for row in self.rows
        )
        return (
            f"<h3>{html.escape(self.title)}</h3><p>{html.escape(self.caption)}</p>"
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>'
            f"</table></div>"
        )


def percent(amount: Amount) -> str:
    """87.91 ± 0.32, of a fraction."""
    spread = "" if amount.sd is None else f" ± {100 * amount.sd:.2f}"
    return f"{100 * amount.mean:.2f}{spread}"


def accuracy(study: Study) -> Table:
    """Methods by batches. Bold where the best leads the second by more than the spread."""
    counts = [cell.top1.n for cell in study.cells.values()]
    usual = statistics.mode(counts)
    leaders = {batch: study.leader(batch) for batch in study.batches}

    def in_trouble(label: str, batch: int) -> bool:
        return study.cells[label, batch].troubled or (label, batch) in study.lost

    rows = []
    for label in study.labels:
        row = [Text(text=label.name)]
        for batch in study.batches:
            cell = study.of(label.name, batch)
            if cell is None:
                row.append(Text(text=NONE))
                continue
            text = percent(cell.top1) + " †" * in_trouble(label.name, batch)
            if cell.top1.n != usual:
                text += f" (n={cell.top1.n})"
            row.append(Text(text=text, bold=leaders[batch] == label.name))
        rows.append(row)
    spread = "mean ± sd over seeds" if max(counts) > 1 else "one seed, so no spread is known"
    caption = f"Top-1 in %, {spread} (n = {usual}{' unless said' * (len(set(counts)) > 1)})."
    if max(counts) > 1:
        caption += (
            " Bold: the best, where it leads the second by more than the spread, "
            f"sqrt(sd_1² + sd_2²), of at least {FEWEST} seeds each."
        )
    if any(in_trouble(*at) for at in study.cells):
        caption += " †: with a run that diverged or skipped many steps."
    head = ["batch", *(f"{batch:,}" for batch in study.batches)]
    return Table(title="Accuracy by batch size", caption=caption, head=head, rows=rows)


def seconds(study: Study) -> Table:
    """Seconds to train, and the ranks they were measured on."""
    rows = []
    for label in study.labels:
        row = [Text(text=label.name)]
        for batch in study.batches:
            cell = study.of(label.name, batch)
            taken = cell.amount("seconds") if cell else None
            ranks = sorted({run.world_size for run in cell.runs if run.world_size}) if cell else []
            on = f" on {', '.join(map(str, ranks))} ranks" if ranks not in ([], [1]) else ""
            row.append(Text(text=f"{amount(taken, 1)}{on}" if taken else NONE))
        rows.append(row)
    caption = "Mean ± sd over seeds, of the steps alone, without evaluations and checkpoints."
    head = ["batch", *(f"{batch:,}" for batch in study.batches)]
    return Table(title="Seconds to train", caption=caption, head=head, rows=rows)


def cost(study: Study, points: float) -> Table:
    """What each method takes, and how far it holds."""
    rows = [[Text(text=label.name), *_cost_row(study, label, points)] for label in study.labels]
    return Table(
        title="Cost, and how far accuracy holds",
        caption=(
            "Passes: forward and backward passes a step. Time: seconds a step over those of the "
            "base method on as many ranks, mean ± sd; several batches: the median of the ratios "
            f"and their range. Holds: the largest batch before a mean more than {points:g} "
            "point below the method's own best."
        ),
        head=["", "passes", "time / base", "‖g_v‖/‖g‖ at looks", "best at", "holds to"],
        rows=rows,
    )


def _cost_row(study: Study, label: Label, points: float) -> list[Text]:
    line = study.along(label.name)
    passes = [a.mean for _, cell in line if (a := cell.amount("passes", per_step=True))]
    times = [t for batch, _ in line if (t := study.cost(label, batch, "seconds"))]
    ratios = [g.mean for _, cell in line if (g := cell.amount("gv_ratio"))]
    hold = study.hold(label.name, points)
    assert hold is not None  # a label has at least one cell
    fall = ""
    if hold.missing:
        fall = f" (no run at {', '.join(f'{b:,}' for b in hold.missing)})"
    if hold.falls_at is not None and hold.fall is not None:
        fall += f", falls by {amount(hold.fall.times(100), 1)} at {hold.falls_at:,}"
    elif hold.falls_at is not None:
        fall += f", no accuracy at {hold.falls_at:,}"
    is_base = label.base_label == label.name
    texts = [
        f"{statistics.median(passes):.2f}" if passes else NONE,
        "1" if is_base else ratio(times),
        _range(ratios, ".2g"),
        f"{hold.best_at:,}: {100 * hold.best.mean:.1f} %",
        f"{hold.up_to:,}{fall}",
    ]
    return [Text(text=text) for text in texts]


def amount(value: Amount, digits: int) -> str:
    """1.23 ± 0.04; without the spread where it is not known."""
    spread = "" if value.sd is None else f" ± {value.sd:.{digits}f}"
    return f"{value.mean:.{digits}f}{spread}"


def ratio(times: Sequence[Amount]) -> str:
    """One ratio with its spread; of several, the median and the range."""
    if len(times) == 1:
        return amount(times[0], 2)
    return _range([t.mean for t in times], ".2f")


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return NONE
    middle = f"{statistics.median(values):{form}}"
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return middle if low == high else f"{middle} ({low} to {high})"


def ranks(series: dict[str, list[tuple[int, Amount]]]) -> Table:
    """Images a second by ranks, and over the fewest."""
    rows = []
    for name, line in series.items():
        fewest, first = line[0]
        for count, rate in line:
            speed = rate.over(first)
            texts = [
                name,
                f"{count:,}",
                amount(rate, 0 if rate.mean >= 100 else 1),
                f"{speed.mean:.2f}",
                f"{100 * speed.mean * fewest / count:.0f} %",
            ]
            rows.append([Text(text=text) for text in texts])
    return Table(
        title="Speed-up by ranks",
        caption="Images a second, mean ± sd over runs; speed-up and efficiency against the fewest "
        "ranks of the same line.",
        head=["", "ranks", "images/s", "speed-up", "efficiency"],
        rows=rows,
    )


def tuning(tuned: Sequence[Tuning]) -> Table:
    """A row for what was tried for a method, a column for each batch with what was taken."""
    batches = sorted({t.batch for t in tuned})
    rows: dict[tuple[str, str, str], dict[int, str]] = {}
    for t in tuned:
        tried = "; ".join(f"{n} {', '.join(f'{v:g}' for v in vs)}" for n, vs in t.tried.items())
        count = len(t.trials) or (t.choice.trials if t.choice else None)
        at = t.label, NONE if count is None else str(count), tried or NONE
        rows.setdefault(at, {})[t.batch] = _chosen(t)
    return Table(
        title="Tuning",
        caption="By batch: the chosen settings and, in brackets, their score, top-1 in % of images "
        "held out for tuning. *: at the edge of what was tried.",
        head=["", "trials", "tried", *(f"{batch:,}" for batch in batches)],
        rows=[
            [Text(text=text) for text in (*at, *(row.get(batch, NONE) for batch in batches))]
            for at, row in rows.items()
        ],
    )


def _chosen(t: Tuning) -> str:
    settings = [
        f"{n} {v:g}{'*' * (n in t.edges)}" if isinstance(v, int | float) else f"{n} {v}"
        for n, v in t.chosen.items()
    ]
    score = t.choice.score if t.choice else None
    return (", ".join(settings) or NONE) + ("" if score is None else f" ({100 * score:.2f})")


_COLUMNS = (
    "folder", "label", "method", "base", "stage", "batch", "seed", "state", "world_size", "top1",
    "steps", "seconds", "images_per_s", "passes", "gv_ratio", "skipped", "holdout",
)  # fmt: skip
_SETTINGS = ("lr", "rho", "k", "alpha", "reuse", "weight_decay", "warmup_steps")


def to_csv(runs: Sequence[Run]) -> str:
    """Every run found, trials and unfinished ones too; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *_SETTINGS, "trouble"])
    for run in sorted(runs, key=lambda r: (r.stage, r.label, r.batch, r.seed, r.folder)):
        row = [getattr(run, name) for name in _COLUMNS]
        writer.writerow([*row, *(run.setting(name) for name in _SETTINGS), run.trouble])
    return text.getvalue()
