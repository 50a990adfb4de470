"""The report's tables, for report.md and for the page."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dist_looksam.report.statistic import Difference, MeanSd
from dist_looksam.report.study import Label, Study
from dist_looksam.report.tuning import Tuning

NONE = "-"


class Bold(str):
    """A cell of a table in bold."""

    bold = True


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, a sentence on how to read it, a head and rows; the first column is names."""

    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in GitHub's Markdown, its columns aligned for the terminal, too."""
        cells = [[f"**{c}**" if isinstance(c, Bold) else c for c in row] for row in self.rows]
        grid = [list(self.head), *([text.replace("|", "\\|") for text in row] for row in cells)]
        widths = [max(3, *map(len, column)) for column in zip(*grid)]
        rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
        lines = [
            "| "
            + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            + " |"
            for row in (grid[0], rule, *grid[1:])
        ]
        return f"**{self.title}.** {self.caption}\n\n" + "\n".join(lines) + "\n"


def mean_sd(value: MeanSd, digits: int, factor: float = 1.0) -> str:
    """1.23 ± 0.04; without the spread where it is unknown."""
    spread = "" if value.sd is None else f" ± {factor * value.sd:.{digits}f}"
    return f"{factor * value.mean:.{digits}f}{spread}"


def percent(value: MeanSd) -> str:
    """87.91 ± 0.32, of a fraction."""
    return mean_sd(value, 2, 100)


def interval(value: Difference | None, digits: int = 2) -> str:
    """+0.51 (-0.20 to +1.22) in points, of a fraction; bold where the interval excludes 0."""
    if value is None:
        return NONE
    text = _points(value.mean, digits)
    if value.low is not None and value.high is not None:
        text += f" ({_points(value.low, digits)} to {_points(value.high, digits)})"
    return Bold(text) if value.clear else text


def _points(value: float, digits: int) -> str:
    return f"{100 * value:+.{digits}f}"


def accuracy(study: Study) -> Table:
    """Methods by batches. Bold where the interval of the best's lead excludes 0."""
    counts = [cell.top1.n for cell in study.cells.values()]
    usual = statistics.mode(counts)
    leaders = {batch: study.leader(batch) for batch in study.batches}

    def in_trouble(label: str, batch: int) -> bool:
        return study.cells[label, batch].troubled or (label, batch) in study.lost

    rows = []
    for label in study.labels:
        row = [label.name]
        for batch in study.batches:
            cell = study.of(label.name, batch)
            if cell is None:
                row.append(NONE)
                continue
            text = percent(cell.top1) + " †" * in_trouble(label.name, batch)
            if cell.top1.n != usual:
                text += f" (n={cell.top1.n})"
            row.append(Bold(text) if leaders[batch] == label.name else text)
        rows.append(row)
    spread = "mean ± sd over seeds" if max(counts) > 1 else "one seed, so no spread is known"
    caption = f"Top-1 in %, {spread} (n = {usual}{' unless said' * (len(set(counts)) > 1)})."
    if max(counts) > 1:
        caption += (
            " Bold: the best, where the 95 % interval of its lead over the second, seed by seed, "
            "leaves out 0."
        )
    if any(in_trouble(*at) for at in study.cells):
        caption += " †: with a run that diverged or skipped many steps."
    head = ["batch", *(f"{batch:,}" for batch in study.batches)]
    return Table(title="Accuracy by batch size", caption=caption, head=head, rows=rows)


def differences(study: Study) -> Table | None:
    """Each method against its base and against SAM, each base against the first; None if none."""
    bases = [label.name for label in study.labels if label.base_label == label.name]
    pairs = [(label.name, label.base_label) for label in study.labels]
    pairs += [(label.name, label.sam_label) for label in study.labels]
    pairs += [(name, bases[0]) for name in bases[1:]]
    rows = []
    for name, other in pairs:
        if other and other != name and (by_batch := study.differences(name, other)):
            cells = [interval(by_batch.get(batch)) for batch in study.batches]
            rows.append([f"{name} - {other}", *cells])
            if len(study.batches) > 1:
                rows[-1].append(interval(study.over_batches(name, other)))
    if not rows:
        return None
    return Table(
        title="Differences in accuracy",
        caption="Points of top-1: the mean of the differences between runs of the same seed and, "
        "in brackets, its 95 % interval (Student's t over the seeds; none of a single seed). Bold: "
        "0 is outside, which by chance alone happens to one in twenty. All: the mean over the "
        "batches at which both were run.",
        head=["", *(f"{b:,}" for b in study.batches), *["all"] * (len(study.batches) > 1)],
        rows=rows,
    )


def seconds(study: Study) -> Table:
    """Methods by batches: the training time."""

    def text(label: str, batch: int) -> str:
        cell = study.of(label, batch)
        value = cell.numbers("seconds") if cell else None
        if not cell or not value:
            return NONE
        ranks = sorted({run.world_size for run in cell.runs if run.world_size})
        where = f" on {', '.join(map(str, ranks))} ranks" if ranks not in ([], [1]) else ""
        return mean_sd(value, 1) + where

    return Table(
        title="Seconds to train",
        caption="Mean ± sd over seeds, of the steps alone, without evaluations and checkpoints.",
        head=["batch", *(f"{batch:,}" for batch in study.batches)],
        rows=[
            [label.name, *(text(label.name, batch) for batch in study.batches)]
            for label in study.labels
        ],
    )


def cost(study: Study, points: float) -> Table:
    """The cost of each method, and its batch range."""
    head = ["", "passes", *["time / base"] * study.quiet, "‖g_v‖/‖g‖ at looks", "best at"]
    time = (
        "Time: seconds a step over those of the base method on as many ranks, the median over "
        "batches and their range. "
    )
    return Table(
        title="Cost, and how far accuracy holds",
        caption="Passes: forward and backward passes a step. "
        + time * study.quiet
        + f"Holds to: the largest batch before a mean more than {points:g} point below the "
        "method's own best; in brackets the 95 % interval of that fall, seed by seed: where it "
        "reaches beyond the limit, chance may have moved the batch.",
        head=[*head, "holds to"],
        rows=[[label.name, *_cost_row(study, label, points)] for label in study.labels],
    )


def _cost_row(study: Study, label: Label, points: float) -> list[str]:
    line = study.along(label.name)
    passes = [a.mean for _, cell in line if (a := cell.numbers("passes", per_step=True))]
    times = [t.mean for batch, _ in line if (t := study.cost(label, batch, "seconds"))]
    ratios = [g.mean for _, cell in line if (g := cell.numbers("gv_ratio"))]
    holds = study.batch_range(label.name, points)
    assert holds is not None  # a label has at least one cell
    text = f"{holds.up_to:,}"
    if holds.missing:
        text += f" (no run at {', '.join(f'{b:,}' for b in holds.missing)})"
    if holds.falls_at is not None:
        fall = interval(holds.fall) if holds.fall else "no accuracy"
        text += f"; {fall} at {holds.falls_at:,}"
    time = "1" if label.base_label == label.name else _range(times, ".2f")
    return [
        f"{statistics.median(passes):.2f}" if passes else NONE,
        *[time] * study.quiet,
        _range(ratios, ".2g"),
        f"{holds.best_at:,}: {100 * holds.best.mean:.1f} %",
        text,
    ]


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return NONE
    middle = f"{statistics.median(values):{form}}"
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return middle if low == high else f"{middle} ({low} to {high})"


def ranks(series: dict[str, list[tuple[int, MeanSd]]]) -> Table:
    """Images a second by ranks, and the speed-up over the fewest ranks."""
    rows = []
    for name, line in series.items():
        fewest, first = line[0]
        for count, rate in line:
            speed_up = rate.mean / first.mean
            rows.append([
                name, f"{count:,}", mean_sd(rate, 0 if rate.mean >= 100 else 1),
                f"{speed_up:.2f}", f"{100 * speed_up * fewest / count:.0f} %",
            ])  # fmt: skip
    return Table(
        title="Speed-up by ranks",
        caption="Images a second, mean ± sd over runs; speed-up and efficiency against the fewest "
        "ranks of the same line.",
        head=["", "ranks", "images/s", "speed-up", "efficiency"],
        rows=rows,
    )


def tuning(tuned: Sequence[Tuning]) -> Table:
    """A row for the tried settings of a method, a column of chosen settings for each batch."""
    batches = sorted({t.batch for t in tuned})
    rows: dict[tuple[str, str, str], dict[int, str]] = {}
    for t in tuned:
        tried = "; ".join(f"{n} {', '.join(f'{v:g}' for v in vs)}" for n, vs in t.tried.items())
        count = len(t.trials) or (t.choice.trials if t.choice else None)
        at = t.label, NONE if count is None else str(count), tried or NONE
        rows.setdefault(at, {})[t.batch] = _chosen(t)
    return Table(
        title="Tuning",
        caption="By batch: the chosen settings and, in brackets, their score, top-1 in % of "
        "training images held out for tuning. *: at the edge of what was tried.",
        head=["", "trials", "tried", *(f"{batch:,}" for batch in batches)],
        rows=[[*at, *(row.get(batch, NONE) for batch in batches)] for at, row in rows.items()],
    )


def _chosen(t: Tuning) -> str:
    settings = [
        f"{n} {v:g}{'*' * (n in t.edges)}" if isinstance(v, int | float) else f"{n} {v}"
        for n, v in t.chosen.items()
    ]
    score = t.choice.score if t.choice else None
    return (", ".join(settings) or NONE) + ("" if score is None else f" ({100 * score:.2f})")
