"""Loss and accuracy of several runs in one picture."""

from collections.abc import Sequence
from pathlib import Path

import altair as alt

from dist_looksam.report import about, drawing
from dist_looksam.report.curves import lines_of, not_finite, smooth
from dist_looksam.report.drawing import Rows


def overlaid(folders: Sequence[Path], out: Path) -> Path:
    """Draw the runs over each other into `out`; returns it. ConfigError as `curves`."""
    losses: Rows = []
    top1: Rows = []
    names = []
    for folder, label in zip(folders, about.labels(folders), strict=True):
        steps, evaluations = lines_of(folder)
        names.append(name := label + not_finite(steps, evaluations))
        losses += [row | {"run": name} for row in smooth(steps, "loss")]
        top1 += [
            {"step": row["step"], "value": row["eval_top1"], "run": name}
            for row in evaluations
            if row["eval_top1"] is not None
        ]
    x = drawing.x_step()
    panels = [_panel(losses, names, x, "Loss, smoothed", legend=not top1)]
    if top1:
        panels.append(_panel(top1, names, x, "Top-1 accuracy at evaluations", legend=True))
    shared = about.title(about.same([about.config_of(folder) for folder in folders]))
    title = f"{len(folders)} runs" + (f": {shared}" if shared else "")
    chart = drawing.across(*panels).properties(title=alt.TitleParams(title, fontSize=18))
    return drawing.save_png(chart, out)


def _panel(rows: Rows, names: list[str], x: alt.X, title: str, *, legend: bool) -> alt.Chart:
    shown = alt.Legend(orient="right", symbolType="stroke", labelLimit=500) if legend else None
    colours = alt.Scale(domain=names, scheme="tableau10" if len(names) <= 10 else "tableau20")
    colour = alt.Color("run:N", scale=colours, legend=shown)
    scale = alt.Scale(domain=drawing.domain([row["value"] for row in rows]), clamp=True)
    y = alt.Y("value:Q", title=None, scale=scale)
    chart = alt.Chart(drawing.rows(rows)).mark_line(strokeWidth=2)
    return chart.encode(x=x, y=y, color=colour).properties(width=440, height=300, title=title)
