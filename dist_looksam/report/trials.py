"""tuning.png: all trials, in a small chart for each method and batch."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dist_looksam.report import drawing
from dist_looksam.report.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Rows
from dist_looksam.report.panels import AMBER, OLIVE, SKY
from dist_looksam.report.tuning import Tuning

_DEEPEST = 20.0  # points below the best trial; worse trials are drawn there
_NO_RHO = "no rho"
_COLOURS = [SKY, BLUE, GREEN, OLIVE, AMBER, ORANGE, PURPLE, INK]  # of rho, rising
_WIDTH = 760  # pixels, of all columns


def chart(tuned: Sequence[Tuning]) -> alt.FacetChart | None:
    """Accuracy against lr, a line for each rho; None where no trial has ended."""
    rows = _rows(tuned)
    if not rows:
        return None
    batches = sorted({row["batch"] for row in rows})
    labels = list(dict.fromkeys(row["label"] for row in rows))
    width = max(70, min(170, _WIDTH // len(batches)))
    header: dict[str, Any] = {"labelFontSize": 12, "labelColor": INK}
    title = alt.TitleParams(
        "Tuning: points below the best trial of each method and batch",
        subtitle="ring: chosen; trials further below stand at the foot",
    )
    return (
        alt.layer(*_layers(rows), data=drawing.rows(rows))
        .properties(width=width, height=72)
        .facet(
            row=alt.Row(
                "label:N",
                sort=labels,
                title=None,
                header=alt.Header(labelAngle=0, labelAlign="left", labelFontWeight=600, **header),
            ),
            column=alt.Column(
                "batch:O",
                sort=batches,
                title="global batch size",
                header=alt.Header(
                    format=",d", titleFontWeight="normal", titleFontSize=12, **header
                ),
            ),
            spacing=12,
        )
        .properties(title=title)
    )


def _rows(tuned: Sequence[Tuning]) -> Rows:
    long: Rows = []
    for t in tuned:
        scores = {run.folder: run.top1 for run in t.trials if run.top1 is not None}
        best = max(scores.values(), default=0.0)
        for run in t.trials:
            if run.folder in scores and run.setting("lr"):
                row = {"label": t.label, "batch": t.batch, "lr": run.setting("lr")}
                row["rho"] = f"{run.tuned['rho']:g}" if "rho" in run.tuned else _NO_RHO
                row["below"] = 100 * (scores[run.folder] - best)
                row["top1"] = f"{100 * scores[run.folder]:.2f} %"
                row["chosen"] = "yes" if t.took(run) else "no"
                long.append(row)
    return long


def _layers(rows: Rows) -> list[alt.Chart]:
    """Lines, trials, and a ring around the chosen trial."""
    floor = min(-1.0, max(-_DEEPEST, 1.08 * min(row["below"] for row in rows)))
    lrs = sorted({row["lr"] for row in rows})
    base = alt.Chart().encode(
        x=alt.X(
            "lr:Q",
            title="lr",
            scale=alt.Scale(type="log", nice=False, padding=10),
            axis=alt.Axis(
                format="~g", grid=False, labelOverlap="greedy", labelSeparation=5, values=lrs
            ),
        ),
        y=alt.Y(
            "below:Q",
            title=None,
            scale=alt.Scale(domain=[floor, -0.08 * floor], clamp=True, nice=False),
            axis=alt.Axis(tickCount=3),
        ),
        color=_colour(rows),
    )
    tips = [
        alt.Tooltip("label:N", title="method"),
        alt.Tooltip("batch:Q", format=",d"),
        alt.Tooltip("lr:Q", format="~g"),
        *(alt.Tooltip(f"{name}:N") for name in ("rho", "top1", "chosen")),
    ]
    ring = base.transform_filter("datum.chosen == 'yes'")
    return [
        base.mark_line(strokeWidth=1.2, opacity=0.6),
        base.mark_circle(size=42, opacity=1).encode(tooltip=tips),
        ring.mark_point(filled=False, size=170, strokeWidth=1.8).encode(color=alt.value(INK)),
    ]


def _colour(rows: Rows) -> alt.Color:
    rhos = sorted({row["rho"] for row in rows} - {_NO_RHO}, key=float)
    colours = {rho: _COLOURS[i % len(_COLOURS)] for i, rho in enumerate(rhos)}
    if any(row["rho"] == _NO_RHO for row in rows):
        colours[_NO_RHO] = GREY
    legend: Any = None
    if rhos:
        legend = alt.Legend(title="rho", orient="right", symbolType="circle", symbolSize=60)
    return drawing.colour("rho", colours, legend=legend)
