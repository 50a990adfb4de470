"""One panel of a report: methods along batch sizes (or ranks), with spread, seeds and names.

Every method has its colour, its marker and, where it is a base alone, a dashed line, so that eight
can be told apart in print and without colours. Names stand at the ends of the lines.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

from dist_looksam.report import drawing
from dist_looksam.report.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Rows
from dist_looksam.report.study import Amount, Label

AMBER, SKY, OLIVE = "#e69f00", "#56b4e9", "#7f7a00"
_OWN = {
    "sgd": GREY, "adamw": INK, "lamb": AMBER, "lars": OLIVE, "sam": BLUE, "sam_k": SKY,
    "look_sam": ORANGE, "layer_sam": GREEN, "look_layer_sam": PURPLE,
}  # fmt: skip
_COLOURS = [ORANGE, BLUE, GREEN, PURPLE, SKY, AMBER, INK, GREY, OLIVE]
SHAPES = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross",
           "triangle-right", "triangle-left"]  # fmt: skip
_SHORT = "datum.value % 512 || datum.value < 1024 ? datum.label : datum.value / 1024 + 'k'"
_CROSS = "M-1,-1L1,1M1,-1L-1,1"  # a run that diverged
_EDGE = 0.3  # octaves from the outer points to the ends of the axis
_DODGE = 10  # pixels from one method to the next at the same x
_NAME_GAP = 17  # pixels from one name at the right to the next


@dataclass(frozen=True)
class Look:
    """How one label is drawn."""

    colour: str
    shape: str
    dash: list[int]


def looks(labels: Sequence[Label]) -> dict[str, Look]:
    """A look for each label; a method keeps its colour from report to report where it can."""
    taken: dict[str, str] = {}
    for label in labels:
        if (own := _OWN[label.method]) not in taken.values():
            taken[label.name] = own
    free = [c for c in _COLOURS if c not in taken.values()] or _COLOURS
    found = {}
    for i, label in enumerate(labels):
        colour = taken.get(label.name) or free[i % len(free)]
        free = [c for c in free if c != colour] or _COLOURS
        dash = [5, 3] if label.base_label == label.name else [1, 0]
        found[label.name] = Look(colour, SHAPES[i % len(SHAPES)], dash)
    return found


@dataclass(frozen=True, kw_only=True)
class Point:
    """A mean of one label at x, in the unit that is drawn; `tip` is what hovering says."""

    label: str
    x: float
    y: float
    low: float
    high: float
    tip: dict[str, str]
    seeds: Sequence[tuple[float, dict[str, str], bool]] = ()  # y, tip, trouble


def point(
    label: str, x: float, value: Amount, tip: dict[str, str], seeds: Sequence[Any] = ()
) -> Point:
    """A point with bars of one standard deviation, of no length where it is not known."""
    sd = value.sd or 0.0
    low, high = value.mean - sd, value.mean + sd
    return Point(label=label, x=x, y=value.mean, low=low, high=high, tip=tip, seeds=seeds)


@dataclass(kw_only=True)
class Panel:
    """A chart to be: points, scales, what is written where."""

    title: str
    points: list[Point]
    looks: dict[str, Look]
    x_title: str
    y_title: str | None = None
    width: int = 260
    height: int = 200
    y_scale: dict[str, Any] = field(default_factory=dict)  # type, domain, reverse
    y_axis: dict[str, Any] = field(default_factory=dict)
    names: bool = False  # at the ends of the lines
    rule: float | None = None  # a horizontal line of reference
    diagonals: Rows = field(default_factory=list)  # x, y, line: dotted ideals
    short: bool = False  # 8k for 8,192 on the x axis
    dodge: bool = True  # neighbours at one x stand side by side, so that none hides another
    hover: bool = False  # a hovered label stands out; for pages, once a chart

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
        layers += [*self._means(x, y)]
        if self.names:
            layers += self._names(x, y)
        return alt.layer(*layers).properties(width=self.width, height=self.height, title=self.title)

    @property
    def _order(self) -> list[str]:
        return [name for name in self.looks if any(p.label == name for p in self.points)]

    @property
    def _gap(self) -> float:
        """Octaves between neighbours at one x: some pixels, where batches leave room for that."""
        ticks = sorted({p.x for p in self.points})
        gaps = [math.log2(b / a) for a, b in itertools.pairwise(ticks)]
        wanted = _DODGE * (sum(gaps) + 2 * _EDGE) / self.width
        room = [0.7 * gap / len(self._order) for gap in gaps]
        return min([wanted, *room]) if self.dodge else 0.0

    def _at(self, p: Point) -> float:
        order = self._order
        return p.x * 2 ** (self._gap * (order.index(p.label) - (len(order) - 1) / 2))

    def _x(self) -> alt.X:
        ticks = sorted({p.x for p in self.points})
        edge = 2 ** (_EDGE + self._gap * (len(self._order) - 1) / 2)
        scale = alt.Scale(type="log", base=2, domain=[ticks[0] / edge, ticks[-1] * edge])
        axis = alt.Axis(
            values=ticks,
            format=",d",
            labelExpr=_SHORT if self.short else alt.Undefined,
            grid=False,
            labelOverlap="greedy",
        )
        return alt.X("x:Q", title=self.x_title, scale=scale, axis=axis)

    def _y(self, name: str = "y") -> alt.Y:
        scale: dict[str, Any] = {"nice": False, "domain": self.domain} | self.y_scale
        # Vega drops every second of explicit ticks that are more than tickCount.
        axis: dict[str, Any] = ({} if "values" in self.y_axis else {"tickCount": 6}) | self.y_axis
        axis["labelFlush"] = True  # else a label at the top lifts the title of its panel alone
        return alt.Y(
            f"{name}:Q", title=self.y_title, scale=alt.Scale(**scale), axis=alt.Axis(**axis)
        )

    @property
    def domain(self) -> list[float]:
        """Limits that hold every point, bar and reference."""
        if "domain" in self.y_scale:
            return self.y_scale["domain"]
        values = [v for p in self.points for v in (p.low, p.high, *(s[0] for s in p.seeds))]
        values += [] if self.rule is None else [self.rule]
        values += [row["y"] for row in self.diagonals]
        if self.y_scale.get("type") == "log":
            values = [v for v in values if v > 0]
            margin = max(1.08, (max(values) / min(values)) ** 0.06)
            return [min(values) / margin, max(values) * margin]
        margin = 0.06 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
        return [min(values) - margin, max(values) + margin]

    def _colour(self) -> alt.Color:
        scale = alt.Scale(domain=list(self.looks), range=[k.colour for k in self.looks.values()])
        return alt.Color("label:N", scale=scale, legend=None)

    def _shape(self) -> alt.Shape:
        scale = alt.Scale(domain=list(self.looks), range=[k.shape for k in self.looks.values()])
        return alt.Shape("label:N", scale=scale, legend=None)

    def _dash(self) -> alt.StrokeDash:
        scale = alt.Scale(domain=list(self.looks), range=[k.dash for k in self.looks.values()])
        return alt.StrokeDash("label:N", scale=scale, legend=None)

    def _means(self, x: alt.X, y: alt.Y) -> list[alt.Chart]:
        """Bars of spread, lines, seeds, and on top the means."""
        floor = self.domain[0]
        beside = 2 ** (self._gap / 2)  # a mean's marker would hide its seeds
        means: Rows = []
        singles: Rows = []
        for p in self.points:
            at: dict[str, Any] = {"label": p.label, "x": self._at(p)}
            means.append(at | {"y": p.y, "low": max(p.low, floor), "high": p.high} | p.tip)
            at |= {"x": beside * at["x"]}
            singles += [at | {"y": value, "trouble": bad} | tip for value, tip, bad in p.seeds]
        base = alt.Chart(drawing.rows(means)).encode(x=x, color=self._colour())
        lines = base.mark_line(strokeWidth=2).encode(y=y, strokeDash=self._dash())
        bars = base.mark_rule(strokeWidth=1.6).encode(y=self._y("low"), y2="high:Q")
        bars = bars.transform_filter("datum.high > datum.low")
        marks = base.mark_point(filled=True, size=46, stroke="white", strokeWidth=0.6).encode(
            y=y, shape=self._shape(), tooltip=_tooltip([p.tip for p in self.points])
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
        return [bars, lines, *seeds, marks]

    def _seeds(self, singles: Rows, x: alt.X, y: alt.Y) -> list[alt.Chart]:
        """A dot for a seed, a cross for one in trouble."""
        tooltip = _tooltip([tip for p in self.points for _, tip, _ in p.seeds])
        layers = []
        for trouble in (False, True):
            if data := [row for row in singles if row["trouble"] is trouble]:
                chart = alt.Chart(drawing.rows(data))
                if trouble:
                    chart = chart.mark_point(shape=_CROSS, size=60, strokeWidth=2, opacity=1)
                else:
                    chart = chart.mark_point(shape="circle", filled=True, size=13, opacity=0.75)
                if self.hover:  # its name in the page; names must differ within one picture
                    chart = chart.properties(name="troubled" if trouble else "seeds")
                layers.append(chart.encode(x=x, y=y, color=self._colour(), tooltip=tooltip))
        return layers

    def _pixel(self, value: float) -> float:
        low, high = self.domain
        log = self.y_scale.get("type") == "log"
        f = math.log if log else float
        share = (f(value) - f(low)) / (f(high) - f(low))
        return self.height * (share if self.y_scale.get("reverse") else 1 - share)

    def _names(self, x: alt.X, y: alt.Y) -> list[alt.Chart]:
        """Markers and names right of the plot, moved apart, tied to their last points."""
        last = {p.label: p for p in sorted(self.points, key=lambda p: p.x)}
        wanted = sorted((self._pixel(p.y), name) for name, p in last.items())
        places = apart([pixel for pixel, _ in wanted], gap=_NAME_GAP, end=self.height)
        rows, ties = [], []
        for (pixel, name), place in zip(wanted, places):
            rows.append({"label": name, "place": place})
            ties.append({"label": name, "x": self._at(last[name]), "from": pixel, "to": place})
        edge = self.width + 16
        at = alt.Chart(drawing.rows(rows)).encode(
            y=alt.Y("place:Q", scale=None, axis=None), color=self._colour()
        )
        tie = alt.Chart(drawing.rows(ties)).mark_rule(
            strokeWidth=1, opacity=0.45, strokeDash=[1, 2]
        )
        return [
            tie.encode(
                x=x,
                x2=alt.value(edge - 8),
                y=alt.Y("from:Q", scale=None, axis=None),
                y2=alt.Y2("to:Q"),
                color=self._colour(),
            ),
            at.mark_point(filled=True, size=62, opacity=1).encode(
                x=alt.value(edge), shape=self._shape()
            ),
            at.mark_text(align="left", dx=10, fontSize=13, fontWeight=600).encode(
                x=alt.value(edge), text="label:N"
            ),
        ]


def apart(wanted: Sequence[float], *, gap: float, end: float) -> list[float]:
    """Places in [0, end], at least `gap` apart, as near (least squares) to the rising `wanted`.

    Pool adjacent violators on wanted_i - i gap.
    """
    pools: list[list[float]] = []  # sum, count
    for i, value in enumerate(wanted):
        pools.append([value - i * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + count]
    flat = [total / count for total, count in pools for _ in range(int(count))]
    last = max(0.0, end - gap * (len(wanted) - 1))
    return [min(max(place, 0.0), last) + i * gap for i, place in enumerate(flat)]


def _tooltip(tips: Sequence[dict[str, str]]) -> list[alt.Tooltip]:
    names = dict.fromkeys(name for tip in tips for name in tip)
    return [alt.Tooltip(f"{name}:N", title=name) for name in names]


def _faint(chart: alt.Chart, pick: alt.Parameter) -> alt.Chart:
    """All but the hovered label stand back."""
    return chart.encode(opacity=alt.condition(pick, alt.value(1), alt.value(0.12)))
