"""curves.png: loss, accuracy, learning rate, gradient norm and the size of g_v over a run."""

import os
from pathlib import Path
from typing import Any

import altair as alt

from dist_looksam import files
from dist_looksam.errors import ConfigError
from dist_looksam.record import rundir
from dist_looksam.record.metrics import read
from dist_looksam.record.progress import h_mm_ss
from dist_looksam.report import about, drawing
from dist_looksam.report.drawing import BLUE, GREEN, INK, ORANGE, PURPLE, Rows
from dist_looksam.report.statistic import many

_LOOK, _BETWEEN, _STEP = "look", "between looks", "step"
_DOTS = {_LOOK: ORANGE, _BETWEEN: BLUE, _STEP: BLUE}
_MOST_DOTS, _MOST_POINTS = 900, 400  # per series: more would overlap at this size


def curves(run_dir: str | os.PathLike[str]) -> Path:
    """Draw `run_dir`/metrics.jsonl as `run_dir`/curves.png; returns its path.

    Works during the run, too. Raises ConfigError where there are no steps to draw.
    """
    folder = Path(run_dir)
    steps, evaluations = lines_of(folder)
    x = drawing.x_step(max(row["step"] for row in steps) + 1)
    top: list[alt.LayerChart] = [_loss(steps, evaluations, x)]
    if any(row["eval_top1"] is not None for row in evaluations):
        top.append(_top1(evaluations, x))
    small = [
        _small(steps, x, "lr", "Learning rate", GREEN, dots=False),
        _small(steps, x, "grad_norm", "Gradient norm  ‖g‖", INK),
        _small(steps, x, "gv_ratio", "New part of a look  ‖g_v‖ / ‖g‖", PURPLE),
    ]
    present = [panel for panel in small if panel is not None]
    upper, lower = drawing.across(*top), drawing.across(*present)
    chart = alt.vconcat(upper, lower, spacing=30) if present else upper
    summary = files.json_object(folder / rundir.SUMMARY) or {}  # of a finished run
    config = about.config_of(folder)
    name = about.title(config) or str(summary.get("optimizer") or folder.resolve().name)
    title = alt.TitleParams(name, subtitle=_subtitle(summary, config, steps), fontSize=18)
    return drawing.save_png(chart.properties(title=title), folder / "curves.png")


def lines_of(folder: Path) -> tuple[Rows, Rows]:
    """(training lines, evaluations) of a run. ConfigError where there are no steps to draw."""
    try:
        steps, evaluations = read(folder / rundir.METRICS)
    except FileNotFoundError:
        steps, evaluations = [], []
    if not steps:
        raise ConfigError(
            f"a run directory must hold a metrics.jsonl with at least one step, got {folder}: give "
            f"the --out of a run that has begun."
        )
    return steps, evaluations


def _subtitle(summary: dict[str, Any], config: dict[str, Any], steps: Rows) -> str:
    last = steps[-1]
    facts = [f"{last['step'] + 1:,} steps"]
    if last.get("seconds"):
        facts.append(f"{h_mm_ss(round(last['seconds']))} h")
    facts += about.facts(summary | config)
    if summary.get("world_size"):
        ranks = many(summary["world_size"], "rank")
        facts.append(f"{ranks}, backend {summary.get('backend', 'unknown')}")
    skipped = sum(bool(row["skipped"]) for row in steps)
    if skipped:
        facts.append(f"{skipped} skipped")
    return "  ·  ".join(facts)


def _kind(row: dict[str, Any], has_looks: bool) -> str:
    if not has_looks:
        return _STEP
    return _LOOK if row["look"] else _BETWEEN


def _series(steps: Rows, field: str) -> tuple[Rows, Rows]:
    """(dots, line) of one field, thinned; the line is smoothed over about 2 % of the run."""
    known = [row for row in steps if row.get(field) is not None]
    has_looks = any(row["look"] for row in steps)
    kinds: dict[str, Rows] = {}
    for row in known:
        kind = _kind(row, has_looks)
        kinds.setdefault(kind, []).append({"step": row["step"], "value": row[field], "kind": kind})
    # Each kind is thinned alone: an even stride over all steps could miss every look.
    dots = [dot for kind in kinds.values() for dot in drawing.thinned(kind, _MOST_DOTS)]
    return dots, smooth(known, field)


def smooth(steps: Rows, field: str) -> Rows:
    """The line of one field, smoothed over about 2 % of the run, thinned."""
    known = [row for row in steps if row.get(field) is not None]
    mean = drawing.smoothed([row[field] for row in known], window=len(known) // 50)
    line = [{"step": row["step"], "value": float(v)} for row, v in zip(known, mean)]
    return drawing.thinned(line, _MOST_POINTS)


def _y(values: list[float], *, log: bool = False) -> alt.Y:
    """The axis of a quantity, of the same kind in every run, so that charts can be compared."""
    scale = alt.Scale(
        type="log" if log else "linear",
        domain=drawing.domain(values, log=log),
        nice=False,
        clamp=True,
    )
    axis = alt.Axis(tickCount=5, format="~g" if log else alt.Undefined)
    return alt.Y("value:Q", title=None, scale=scale, axis=axis)


def _loss(steps: Rows, evaluations: Rows, x: alt.X) -> alt.LayerChart:
    dots, line = _series(steps, "loss")
    evaluated = [
        {"step": row["step"], "value": row["eval_loss"], "kind": "evaluation"}
        for row in evaluations
        if row["eval_loss"] is not None
    ]
    kinds = [kind for kind in _DOTS if any(dot["kind"] == kind for dot in dots)]
    names = {kind: _DOTS[kind] for kind in kinds} | {"smoothed": INK}
    names |= {"evaluation": GREEN} if evaluated else {}
    legend = alt.Legend(symbolType="circle", symbolSize=60)
    colour = drawing.colour("kind", names, legend=legend)
    y = _y([row["value"] for row in dots + line + evaluated])
    layers: list[alt.Chart] = [
        _dots(dots).encode(x=x, y=y, color=colour),
        alt.Chart(drawing.rows([row | {"kind": "smoothed"} for row in line]))
        .mark_line(strokeWidth=2)
        .encode(x=x, y=y, color=colour),
    ]
    if evaluated:
        layers.append(
            alt.Chart(drawing.rows(drawing.thinned(evaluated, _MOST_POINTS)))
            .mark_line(strokeWidth=2, point=len(evaluated) < 40)
            .encode(x=x, y=y, color=colour)
        )
    layers += _skipped(steps, x)
    title = "Loss" + not_finite(steps, evaluations)
    return alt.layer(*layers).properties(width=560, height=270, title=title)


def not_finite(steps: Rows, evaluations: Rows) -> str:
    """Where the loss was nan or infinite, which no line shows; "" for nowhere."""
    lost = [row["step"] for row in steps if row["loss"] is None]
    later = [row["step"] for row in evaluations if row["eval_loss"] is None]
    counts = [many(len(x), kind) for x, kind in ((lost, "step"), (later, "evaluation")) if x]
    if not counts:
        return ""
    return f": nan in {' and '.join(counts)}, first at step {min(lost + later):,}"


def _dots(dots: Rows) -> alt.Chart:
    size, opacity = (
        (48, 0.85) if len(dots) < 150 else (14, 0.3)
    )  # few dots must be visible beside the line
    return alt.Chart(drawing.rows(dots)).mark_circle(size=size, opacity=opacity)


def _skipped(steps: Rows, x: alt.X) -> list[alt.Chart]:
    """Red ticks at the foot where the whole step was skipped (overflow, non-finite gradient)."""
    skipped = [{"step": row["step"]} for row in steps if row["skipped"]]
    if not skipped:
        return []
    data = drawing.rows(drawing.thinned(skipped, _MOST_POINTS))
    ticks = alt.Chart(data).mark_tick(color="#c1121f", thickness=1.5, size=9, yOffset=-5)
    return [ticks.encode(x=x, y=alt.value("height"))]


def _top1(evaluations: Rows, x: alt.X) -> alt.LayerChart:
    known = [row for row in evaluations if row["eval_top1"] is not None]
    points = [{"step": row["step"], "value": row["eval_top1"]} for row in known]
    averaged = [row for row in known if row.get("ema_top1") is not None]
    ema = [{"step": row["step"], "value": row["ema_top1"]} for row in averaged]
    values = [row["value"] for row in points + ema]
    margin = 0.15 * (max(values) - min(values)) or 0.05
    limits = [max(0.0, min(values) - margin / 3), min(1.0, max(values) + margin)]
    y = alt.Y(
        "value:Q",
        title=None,
        scale=alt.Scale(domain=limits, nice=False),
        axis=alt.Axis(format="%" if limits[1] - limits[0] > 0.05 else ".1%", tickCount=6),
    )
    line = alt.Chart(drawing.rows(drawing.thinned(points, _MOST_POINTS))).mark_line(
        color=GREEN,
        strokeWidth=2,
        point={"color": GREEN, "size": 30} if len(points) < 40 else False,
    )
    mark = alt.Chart(drawing.rows([points[-1]])).encode(x=x, y=y)
    dashed = alt.Chart(drawing.rows(drawing.thinned(ema, _MOST_POINTS)))
    return alt.layer(
        *([dashed.mark_line(color=PURPLE, strokeDash=[5, 3]).encode(x=x, y=y)] if ema else ()),
        line.encode(x=x, y=y),
        mark.mark_circle(color=ORANGE, size=70, opacity=1),
        mark.mark_text(
            color=ORANGE, align="right", dx=-2, dy=-13, fontSize=12, fontWeight=600
        ).encode(text=alt.value(f"last {points[-1]['value']:.2%}")),
    ).properties(
        width=328,
        height=270,
        title=f"Top-1 accuracy{'; dashed: averaged weights' if ema else ' at evaluations'}",
    )


def _small(
    steps: Rows, x: alt.X, field: str, title: str, colour: str, *, dots: bool = True
) -> alt.LayerChart | None:
    """A panel of the lower row; None where no step has the number. Norms have dots and a
    logarithmic axis."""
    if dots:  # a logarithmic axis has no place for 0
        steps = [row for row in steps if (row.get(field) or 0) > 0]
    raw, line = _series(steps, field)
    if not raw:
        return None
    if not dots:  # a schedule: exact, not smoothed
        line = drawing.thinned(sorted(raw, key=lambda row: row["step"]), _MOST_POINTS)
    y = _y([row["value"] for row in (raw if dots else line)], log=dots)
    layers = []
    if dots:
        layers.append(_dots(raw).encode(x=x, y=y, color=drawing.colour("kind", _DOTS)))
    marks = alt.Chart(drawing.rows(line)).mark_line(color=colour, strokeWidth=2)
    layers.append(marks.encode(x=x, y=y))
    return alt.layer(*layers).properties(width=272, height=150, title=title)
