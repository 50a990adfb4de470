"""Charts whose data change while they are shown: the panels of `curves`, of one run or of several.

The specification names its data; `Live.data` are the rows of these names. The specification
changes only where a panel appears or a run does.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import altair as alt

from dist_looksam.report import drawing
from dist_looksam.report.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Rows

Points: TypeAlias = Sequence[tuple[int, float]]
Curves: TypeAlias = Mapping[str, Points]  # of a run, by the names of metrics.jsonl and more

COLOURS = [BLUE, ORANGE, GREEN, PURPLE, "#e69f00", "#56b4e9", INK, "#7f7a00", "#a50f15", GREY]
_LOOK, _BETWEEN, _STEP = "look", "between looks", "step"
_SMOOTHED, _EVALUATION = "smoothed", "evaluation"
_KINDS = {_LOOK: ORANGE, _BETWEEN: BLUE, _STEP: BLUE, _SMOOTHED: INK, _EVALUATION: GREEN}
_LAST = {"name": "last", "value": 1}  # the end of the x axes, which the page sets
_MOST_HOVER = 80  # places of a curve that tell their numbers


@dataclass(frozen=True)
class _Panel:
    """A panel. `fields`: what is drawn solid, and dashed."""

    name: str
    title: str
    fields: tuple[str, ...]
    colour: str
    dashed: str = ""  # words of the title where the second is there
    log: bool = False
    smooth: bool = False
    format: str | None = None
    width: int = 300
    height: int = 150


_PANELS = (
    _Panel("loss", "Loss", ("loss", "eval_loss"), INK, "evaluation", smooth=True,
           width=590, height=270),
    _Panel("top1", "Top-1 at evaluations", ("eval_top1", "ema_top1"), GREEN,
           "averaged weights", format=".1%", width=386, height=270),
    _Panel("lr", "Learning rate", ("lr",), GREEN, format="~g"),
    _Panel("looks", "Looks so far", ("looks",), ORANGE, format=",d"),
    _Panel("speed", "Images per second", ("images_per_s",), INK, smooth=True, format="~s"),
    _Panel("mfu", "MFU, share of the GPUs' peak", ("mfu",), INK, smooth=True, format=".1%"),
    _Panel("grad_norm", "Gradient norm  ‖g‖", ("grad_norm",), INK, log=True, smooth=True,
           format="~g"),
    _Panel("gv_ratio", "New part of a look  ‖g_v‖ / ‖g‖", ("gv_ratio",), PURPLE, log=True,
           smooth=True, format="~g"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Live:
    """`shape`: equal for equal specifications. `last`: the newest step, the end of the x axes."""

    shape: str
    spec: dict[str, Any] | None
    data: dict[str, Rows]
    last: int


def live(
    runs: Mapping[str, Curves], colours: Mapping[str, str], before: Live | None = None
) -> Live:
    """The charts of `runs`, by their labels. With one run the colours are those of `curves`.
    `before`: earlier charts, whose specification is taken if it is the same."""
    alone = len(runs) == 1
    data: dict[str, Rows] = {}
    shown = [panel for panel in _PANELS if _fill(panel, runs, alone, data)]
    last = max((row["step"] for rows in data.values() for row in rows), default=1)
    series = {(name, row["series"], row["dash"]) for name in data for row in data[name]}
    shape = hashlib.sha256(repr((sorted(series), *colours.items())).encode()).hexdigest()[:16]
    if before is not None and before.shape == shape:
        spec = before.spec
    else:
        spec = _spec(shown, data, dict(colours), alone) if shown else None
    return Live(shape=shape, spec=spec, data=data, last=max(1, last))


# The rows: step, value (within the limits of the axis), exact, run, series, dash.


def _fill(panel: _Panel, runs: Mapping[str, Curves], alone: bool, data: dict[str, Rows]) -> bool:
    """Add the rows of a panel to `data`; False where there are none."""
    lines: Rows = []
    dots: Rows = []
    for label, curves in runs.items():
        for field in panel.fields:
            points = [p for p in curves[field] if p[1] > 0 or not panel.log]
            lines += _line(panel, field, points, label, alone)
        if alone and panel.name == "loss":
            dots += _dots(curves, label)
    if not lines:
        return False
    low, high = _limits([row["exact"] for row in lines + dots], panel)
    for row in lines + dots:
        row["value"] = min(high, max(low, row["exact"]))
    data[panel.name] = lines
    if dots:
        data[f"{panel.name}_dots"] = dots
    if panel.name == "loss":
        for name in ("skipped", "resumed"):
            marks = [
                {"step": step, "run": label, "series": name, "dash": False}
                for label, curves in runs.items()
                for step, _ in curves[name]
            ]
            if marks:
                data[name] = marks
    return True


def _line(panel: _Panel, field: str, points: Points, label: str, alone: bool) -> Rows:
    values = [value for _, value in points]
    if panel.smooth and field == panel.fields[0]:
        values = drawing.smoothed(values, window=len(values) // 50).tolist()
    series = label
    if alone and panel.name == "loss":
        series = _SMOOTHED if field == panel.fields[0] else _EVALUATION
    dash = field != panel.fields[0]
    return [
        {"step": step, "exact": value, "run": label, "series": series, "dash": dash}
        for (step, _), value in zip(points, values)
    ]


def _dots(curves: Curves, label: str) -> Rows:
    looks, between = curves["loss of looks"], curves["loss between"]
    kinds = {_LOOK: looks, (_BETWEEN if looks else _STEP): between}
    return [
        {"step": step, "exact": value, "run": label, "series": kind, "dash": False}
        for kind, points in kinds.items()
        for step, value in points
    ]


def _limits(values: list[float], panel: _Panel) -> list[float]:
    """Without the outer 1 %; all of an exact curve."""
    if panel.smooth:
        return drawing.domain(values, log=panel.log)
    return [min(values), max(values)]


# The specification, of parts that are made once: Altair takes a second for all of them.


def _spec(
    shown: Sequence[_Panel], data: dict[str, Rows], colours: dict[str, str], alone: bool
) -> dict[str, Any]:
    made = {}
    for panel in shown:
        of_loss = panel.name == "loss"
        made[panel] = _part(
            panel,
            tuple(_names(panel, data, colours, alone).items()),
            legend=alone and of_loss,
            dashed=any(row["dash"] for row in data[panel.name]),
            more=tuple(n for n in ("loss_dots", "skipped", "resumed") if of_loss and n in data),
        )
    upper = [part for panel, part in made.items() if panel.height > 200]
    small = [part for panel, part in made.items() if panel.height <= 200]
    rows = [upper, *(small[i : i + 3] for i in range(0, len(small), 3))]
    made_of = {"vconcat": [_across(row) for row in rows if row]}
    return drawing.spec(alt.vconcat(spacing=26)) | made_of | {"params": [_LAST]}


def _across(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    resolve = {"scale": {"color": "independent"}}
    return {"hconcat": parts, "bounds": "flush", "spacing": 72, "resolve": resolve}


@functools.lru_cache(maxsize=200)
def _part(
    panel: _Panel,
    names: tuple[tuple[str, str], ...],
    *,
    legend: bool,
    dashed: bool,
    more: tuple[str, ...],
) -> dict[str, Any]:
    """The specification of a panel. names: colours of its series. more: its other data."""
    x = alt.X(
        "step:Q",
        title="step",
        axis=alt.Axis(format=",d", grid=False, tickMinStep=1, tickCount=6),
        scale=alt.Scale(nice=False, domainMin=0, domainMax=alt.expr("last")),
    )
    scale = alt.Scale(
        type="log" if panel.log else "linear",
        zero=alt.Undefined if panel.log else False,
        nice=False,
        padding=9,
    )
    axis = alt.Axis(tickCount=5, format=panel.format or alt.Undefined, labelFlush=True)
    y = alt.Y("value:Q", title=None, scale=scale, axis=axis)
    key = alt.Legend(symbolType="circle", symbolSize=60) if legend else None
    at = {"x": x, "y": y, "color": drawing.colour("series", dict(names), legend=key)}
    layers = [_faint(panel, at)] if "loss_dots" in more else []
    layers += _lines(panel, at)
    layers += [_marks(name, x) for name in ("skipped", "resumed") if name in more]
    words = [panel.title, *[f"dashed: {panel.dashed}"] * dashed]
    words += ["red: skipped steps"] * ("skipped" in more) + ["grey: resumed"] * ("resumed" in more)
    chart = alt.layer(*layers).properties(width=panel.width, height=panel.height)
    made = chart.properties(title=";  ".join(words)).to_dict(validate=False)
    return {name: part for name, part in made.items() if name not in ("$schema", "config")}


def _names(
    panel: _Panel, data: dict[str, Rows], colours: dict[str, str], alone: bool
) -> dict[str, str]:
    """The colours of the panel's series."""
    if not alone:
        return colours
    rows = [*data[panel.name], *data.get(f"{panel.name}_dots", [])]
    there = {row["series"] for row in rows}
    if panel.name == "loss":
        return {kind: colour for kind, colour in _KINDS.items() if kind in there}
    return dict.fromkeys(there, panel.colour)


def _faint(panel: _Panel, at: dict[str, Any]) -> alt.Chart:
    dots = alt.Chart(alt.NamedData(f"{panel.name}_dots")).mark_circle(size=34, opacity=0.5)
    return dots.encode(**at).properties(name=f"dots_{panel.name}")


def _lines(panel: _Panel, at: dict[str, Any]) -> list[alt.Chart]:
    """The curves, their newest points, and places to hover over."""
    chart = alt.Chart(alt.NamedData(panel.name))
    dash = alt.StrokeDash(
        "dash:N", legend=None, scale=alt.Scale(domain=[False, True], range=[[1, 0], [5, 3]])
    )
    steps: dict[str, Any] = {"interpolate": "step-after"} if panel.name == "looks" else {}
    lines = chart.mark_line(strokeWidth=2, **steps).encode(**at, strokeDash=dash, detail="run:N")
    numbered = chart.transform_window(
        number="row_number()", sort=[alt.SortField("step")], groupby=["run", "series", "dash"]
    ).transform_joinaggregate(of="count()", groupby=["run", "series", "dash"])
    newest = numbered.transform_filter("datum.number == datum.of").mark_circle(size=46, opacity=1)
    every = f"datum.number % ceil(datum.of / {_MOST_HOVER}) == 0"
    exact = alt.Tooltip("exact:Q", title=panel.title, format=panel.format or ".4f")
    tip = [alt.Tooltip("run:N"), alt.Tooltip("step:Q", format=",d"), exact]
    places = numbered.transform_filter(every).mark_circle(size=120, opacity=0)
    return [
        lines.properties(name=f"lines_{panel.name}"),
        newest.encode(**at, tooltip=tip).properties(name=f"newest_{panel.name}"),
        places.encode(**at, tooltip=tip).properties(name=f"places_{panel.name}"),
    ]


def _marks(name: str, x: alt.X) -> alt.Chart:
    chart = alt.Chart(alt.NamedData(name))
    tip = [alt.Tooltip("run:N"), alt.Tooltip("step:Q", title=name, format=",d")]
    if name == "skipped":  # at the foot, as in `curves`
        ticks = chart.mark_tick(color="#c1121f", thickness=1.5, size=9, yOffset=-5)
        made = ticks.encode(x=x, y=alt.value("height"), tooltip=tip)
    else:
        made = chart.mark_rule(color=GREY, strokeDash=[2, 3]).encode(x=x, tooltip=tip)
    return made.properties(name=name)
