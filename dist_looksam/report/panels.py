"""One panel of a report: methods by batch size or ranks, every point at its exact value.

Markers are small and open and lines thin, so that coinciding points stay visible; bases are dashed.
A method's colour and marker follow from its place in the table of methods, so that they are the
same in every report. Names are at the ends of the lines.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt
import numpy as np
from scipy.optimize import isotonic_regression

from dist_looksam.optim.table import METHODS
from dist_looksam.report import drawing
from dist_looksam.report.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Rows
from dist_looksam.report.statistic import MeanSd
from dist_looksam.report.study import Label

AMBER, SKY, OLIVE = "#e69f00", "#56b4e9", "#7f7a00"
# The first four are of bases, the next of methods with ascent. More methods and variants take
# what follows; more bases take from the end, so that no new row changes the style of another.
_COLOURS = [GREY, INK, AMBER, OLIVE, BLUE, SKY, ORANGE, GREEN, PURPLE,
            "#a50f15", "#00a3a3", "#6b4f2a", "#e377c2", "#3f007d", "#4d9221",
            "#b2abd2"]  # fmt: skip
_SHAPES = ["triangle-left", "circle", "square", "triangle-right", "diamond", "wedge",
           "triangle-up", "triangle-down", "cross", "arrow", "M-1,-1L1,-1L-1,1L1,1Z",
           "M0,-1L0.59,0.81L-0.95,-0.31L0.95,-0.31L-0.59,0.81Z"]  # fmt: skip
_OF_BASES = 4
_SHORT = "datum.value % 512 || datum.value < 1024 ? datum.label : datum.value / 1024 + 'k'"
_CROSS = "M-1,-1L1,1M1,-1L-1,1"  # a run that diverged
_EDGE = 0.3  # octaves from the outer points to the ends of the axis
_NAME_GAP = 17  # pixels from one name at the right to the next


@dataclass(frozen=True)
class Style:
    """Colour, marker and dash of one label."""

    colour: str
    shape: str
    dash: list[int]


def _own(palette: list[str], method: str) -> str:
    """A method's entry of `palette`, by its place among bases or among the others."""
    alike = [m for m in METHODS if (METHODS[m].ascent is None) == (METHODS[method].ascent is None)]
    place = alike.index(method)
    if METHODS[method].ascent is not None:
        return palette[(_OF_BASES + place) % len(palette)]
    return palette[place if place < _OF_BASES else _OF_BASES - 1 - place]


def styles(labels: Iterable[Label]) -> dict[str, Style]:
    """A style for each label. The first of a method has the method's own colour and marker; other
    labels of the same method have its marker and a colour that is no method's.
    """
    made: dict[str, Style] = {}
    own: dict[str, str] = {}
    for label in labels:
        if label.method not in own or label.name == label.method:
            own[label.method] = label.name
    free = 0
    for label in labels:
        known = label.method in METHODS
        if not known or own[label.method] != label.name:
            colour, free = _COLOURS[(len(METHODS) + free) % len(_COLOURS)], free + 1
        else:
            colour = _own(_COLOURS, label.method)
        shape = _own(_SHAPES, label.method) if known else _SHAPES[len(METHODS) % len(_SHAPES)]
        dash = [5, 3] if label.base_label == label.name else [1, 0]
        made[label.name] = Style(colour, shape, dash)
    return made


@dataclass(frozen=True, kw_only=True)
class Point:
    """A mean of one label at x, in the drawn unit; `tip` is its tooltip.

    low and high: the lowest and the highest run.
    """

    label: str
    x: float
    y: float
    low: float
    high: float
    tip: dict[str, str]
    seeds: Sequence[tuple[float, dict[str, str], bool]] = ()  # y, tip, trouble


def point(
    label: str, x: float, value: MeanSd, tip: dict[str, str], seeds: Sequence[Any] = ()
) -> Point:
    """A point of these values."""
    low, high = min(value.values), max(value.values)
    return Point(label=label, x=x, y=value.mean, low=low, high=high, tip=tip, seeds=seeds)


@dataclass(kw_only=True)
class Panel:
    """The points, scales and texts of a chart."""

    title: str
    points: list[Point]
    styles: dict[str, Style]
    x_title: str
    width: int = 260
    height: int = 200
    y_scale: dict[str, Any] = field(default_factory=dict)  # type, domain, reverse
    y_axis: dict[str, Any] = field(default_factory=dict)
    names: bool = False  # shown at the ends of the lines
    rule: float | None = None  # a horizontal line of reference
    diagonals: Rows = field(default_factory=list)  # x, y, line: dotted ideals
    hover: bool = False  # highlight a hovered label; on pages, once a chart

    def chart(self) -> alt.LayerChart:
        """The Altair chart."""
        x, y = self._x(), self._y()
        layers: list[alt.Chart] = []
        if self.rule is not None:
            data = drawing.rows([{"y": self.rule}])
            layers.append(alt.Chart(data).mark_rule(color=GREY, strokeDash=[2, 3]).encode(y=y))
        if self.diagonals:
            data = drawing.rows(self.diagonals)
            dotted = alt.Chart(data).mark_line(color=GREY, strokeDash=[2, 3], strokeWidth=1.5)
            layers.append(dotted.encode(x=x, y=y, detail="line:N"))
        layers += self._means(x, y)
        if self.names:
            layers += self._names(x)
        return alt.layer(*layers).properties(width=self.width, height=self.height, title=self.title)

    def _x(self) -> alt.X:
        ticks, edge = sorted({p.x for p in self.points}), 2**_EDGE
        scale = alt.Scale(type="log", base=2, domain=[ticks[0] / edge, ticks[-1] * edge])
        axis = alt.Axis(
            values=ticks,
            format=",d",
            labelExpr=_SHORT if self.width < 400 else alt.Undefined,
            grid=False,
            labelOverlap="greedy",
        )
        return alt.X("x:Q", title=self.x_title, scale=scale, axis=axis)

    def _y(self, name: str = "y") -> alt.Y:
        scale: dict[str, Any] = {"nice": False, "domain": self.domain} | self.y_scale
        # Vega drops every second of explicit ticks that are more than tickCount.
        axis: dict[str, Any] = ({} if "values" in self.y_axis else {"tickCount": 6}) | self.y_axis
        axis["labelFlush"] = True  # else a label at the top lifts the title of its panel alone
        return alt.Y(f"{name}:Q", title=None, scale=alt.Scale(**scale), axis=alt.Axis(**axis))

    @property
    def domain(self) -> list[float]:
        """Limits that hold every point, bar and reference."""
        if "domain" in self.y_scale:
            return self.y_scale["domain"]
        values = [v for p in self.points for v in (p.low, p.high)]
        values += [] if self.rule is None else [self.rule]
        values += [row["y"] for row in self.diagonals]
        low, high = min(values), max(values)
        if self.y_scale.get("type") == "log":
            margin = max(1.08, (high / low) ** 0.06)
            return [low / margin, high * margin]
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        return [low - margin, high + margin]

    def _by_label(self, kind: Any, channel: str) -> Any:
        """The encoding of a label by one attribute of its style."""
        values = [getattr(style, channel) for style in self.styles.values()]
        scale = alt.Scale(domain=list(self.styles), range=values)
        return kind("label:N", scale=scale, legend=None)

    def _colour(self) -> alt.Color:
        return self._by_label(alt.Color, "colour")

    def _means(self, x: alt.X, y: alt.Y) -> list[alt.Chart]:
        """Bars from run to run, lines, means, and on top the seeds."""
        means: Rows = []
        singles: Rows = []
        for p in self.points:
            at = {"label": p.label, "x": p.x}
            means.append(at | {"y": p.y, "low": p.low, "high": p.high} | p.tip)
            singles += [at | {"y": value, "trouble": bad} | tip for value, tip, bad in p.seeds]
        base = alt.Chart(drawing.rows(means)).encode(x=x, color=self._colour())
        dash = self._by_label(alt.StrokeDash, "dash")
        lines = base.mark_line(strokeWidth=1.5, strokeOpacity=0.8).encode(y=y, strokeDash=dash)
        bars = base.mark_rule(strokeWidth=1.2, strokeOpacity=0.5)
        bars = bars.encode(y=self._y("low"), y2="high:Q")
        bars = bars.transform_filter("datum.high > datum.low")
        # An almost transparent filling, so that hovering works inside the marker, too.
        marks = base.mark_point(size=52, strokeWidth=1.7, fill="white", fillOpacity=0.01).encode(
            y=y,
            shape=self._by_label(alt.Shape, "shape"),
            tooltip=_tooltip([p.tip for p in self.points]),
        )
        seeds = self._seeds(singles, x, y)
        if self.hover:
            pick = alt.selection_point(
                fields=["label"], on="pointerover", clear="pointerout", name="method", empty=True
            )
            marks = marks.add_params(pick).properties(name="means")
            lines, bars, marks = (_faint(chart, pick) for chart in (lines, bars, marks))
            seeds = [_faint(chart, pick) for chart in seeds]
        else:
            marks = marks.encode(opacity=alt.value(1))
        return [bars, lines, marks, *seeds]  # a seed within a mean's marker can be hovered over

    def _seeds(self, singles: Rows, x: alt.X, y: alt.Y) -> list[alt.Chart]:
        """A dot for each seed, a cross for a seed in trouble."""
        tooltip = _tooltip([tip for p in self.points for _, tip, _ in p.seeds])
        layers = []
        for trouble in (False, True):
            if data := [row for row in singles if row["trouble"] is trouble]:
                chart = alt.Chart(drawing.rows(data))
                if trouble:
                    chart = chart.mark_point(shape=_CROSS, size=60, strokeWidth=2, opacity=1)
                else:
                    chart = chart.mark_point(shape="circle", filled=True, size=9, opacity=0.6)
                if self.hover:  # for the page's scripts; names must differ within a chart
                    chart = chart.properties(name="troubled" if trouble else "seeds")
                layers.append(chart.encode(x=x, y=y, color=self._colour(), tooltip=tooltip))
        return layers

    def _pixel(self, value: float) -> float:
        low, high = self.domain
        log = self.y_scale.get("type") == "log"
        f = math.log if log else float
        share = (f(value) - f(low)) / (f(high) - f(low))
        return self.height * (share if self.y_scale.get("reverse") else 1 - share)

    def _names(self, x: alt.X) -> list[alt.Chart]:
        """Markers and names right of the plot, moved apart, connected to their last points."""
        last = {p.label: p for p in sorted(self.points, key=lambda p: p.x)}
        wanted = sorted((self._pixel(p.y), name) for name, p in last.items())
        places = apart([pixel for pixel, _ in wanted], gap=_NAME_GAP, end=self.height)
        rows = [
            {"label": name, "x": last[name].x, "from": pixel, "place": place}
            for (pixel, name), place in zip(wanted, places)
        ]
        edge = self.width + 16
        at = alt.Chart(drawing.rows(rows)).encode(
            y=alt.Y("place:Q", scale=None, axis=None), color=self._colour()
        )
        shape = self._by_label(alt.Shape, "shape")
        return [
            at.mark_rule(strokeWidth=1, opacity=0.45, strokeDash=[1, 2]).encode(
                x=x,
                x2=alt.value(edge - 8),
                y=alt.Y("from:Q", scale=None, axis=None),
                y2=alt.Y2("place:Q"),
            ),
            at.mark_point(size=52, strokeWidth=1.7, opacity=1).encode(
                x=alt.value(edge), shape=shape
            ),
            at.mark_text(align="left", dx=10, fontSize=13, fontWeight=600).encode(
                x=alt.value(edge), text="label:N"
            ),
        ]


def apart(wanted: Sequence[float], *, gap: float, end: float) -> list[float]:
    """Places in [0, end], at least `gap` apart, as near (least squares) to the rising `wanted`."""
    if not wanted:
        return []
    steps = gap * np.arange(len(wanted))
    flat = isotonic_regression(np.asarray(wanted) - steps).x
    return (np.clip(flat, 0, max(0.0, end - steps[-1])) + steps).tolist()


def _tooltip(tips: Sequence[dict[str, str]]) -> list[alt.Tooltip]:
    names = dict.fromkeys(name for tip in tips for name in tip)
    return [alt.Tooltip(f"{name}:N", title=name) for name in names]


def _faint(chart: alt.Chart, pick: alt.Parameter) -> alt.Chart:
    """Fade all but the hovered label."""
    return chart.encode(opacity=alt.condition(pick, alt.value(1), alt.value(0.12)))
