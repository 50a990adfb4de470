"""The picture of `dist-looksam flatness`: measured runs side by side, seeds of a kind together.

Lines and markers are means; bars and bands reach from the lowest to the highest run.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from dist_looksam import files
from dist_looksam.flatness.groups import (
    BITS,
    FORMAT,
    Group,
    Measured,
    caption,
    grouped,
    lost,
    table,
    unlike,
)
from dist_looksam.record import rundir
from dist_looksam.report import drawing
from dist_looksam.report.drawing import GREY, INK, Rows
from dist_looksam.report.panels import styles
from dist_looksam.report.statistic import many
from dist_looksam.report.study import Label
from dist_looksam.report.tables import Table

_WIDTH, _HEIGHT = 230, 190
_MOST_VALUES = 4  # groups whose means are written beside their marks
_NAMES = {"gradient": "along the gradient of all images", "random": "along a random direction"}


def read(folders: Sequence[str | Path]) -> list[Measured]:
    """The flatness.json of the run directories that have one."""
    found = [files.json_object(Path(folder) / rundir.FLATNESS) for folder in folders]
    return [content for content in found if content and content.get("format") == FORMAT]


def as_table(measured: Sequence[Measured]) -> Table:
    """The table of the report."""
    head, rows = table(grouped(measured))
    note = "".join(f" {sentence}" for sentence in unlike(measured))
    return Table(title="Flatness", caption=caption(measured) + note, head=head, rows=rows)


def picture(measured: Sequence[Measured]) -> alt.VConcatChart:
    """flatness.png: loss against radius in the first two rows, all else in the third."""
    groups = grouped(measured)
    colours = _colours(groups)
    settings = measured[0]["settings"]
    rows = [_radii(groups, colours, scope) for scope in ("model", "layer")]
    one = f"one image: {100 / settings['test_samples']:.2g}"
    falls = [v for g in groups for bits in BITS for v in g.values(_lost(bits))]
    reach = [min([*falls, -1e-9]), max([*falls, 1e-9])]  # shared by int8 and int4
    third = [
        _bars(groups, colours, "Largest eigenvalue", _eigenvalue, _number, None),
        _bars(groups, colours, "Trace of the Hessian", _trace, _number, None),
        *(
            _bars(groups, colours, f"int{bits}: points of test top-1 ({one})", _lost(bits),
                  "{:+.2f}".format, reach)
            for bits in BITS
        ),
    ]  # fmt: skip
    rows += [drawing.across(*third, spacing=72), _lines(groups, colours)]
    subtitle = [
        f"{many(len(measured), 'run')} · {settings['samples']:,} training images, "
        f"{settings['test_samples']:,} test images, eval mode, no augmentation",
        "Lines and markers: means over seeds; bands and bars: from the lowest to the highest run",
        *unlike(measured),
    ]
    chart = alt.vconcat(_legend(groups, colours), *rows, spacing=26)
    return chart.properties(
        title=alt.TitleParams("Flatness of the minima", subtitle=subtitle, fontSize=18)
    )


def _colours(groups: Sequence[Group]) -> dict[str, str]:
    labels = [Label(name=g.name, method=g.method, base=g.base) for g in groups]
    return {name: style.colour for name, style in styles(labels).items()}


def _legend(groups: Sequence[Group], colours: dict[str, str]) -> alt.LayerChart:
    """A line of text for each group; the panels have no legends of their own."""
    rows = [{"group": g.name, "text": f"{g.name}  ({many(len(g.runs), 'run')})"} for g in groups]
    base = alt.Chart(drawing.rows(rows)).encode(
        y=alt.Y("group:N", axis=None, sort=None), color=drawing.colour("group", colours)
    )
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(x=alt.value(6))
    names = base.mark_text(align="left", fontSize=13, fontWeight=600)
    layered = alt.layer(dots, names.encode(x=alt.value(18), text="text:N"))
    return layered.properties(width=4 * _WIDTH, height=20 * len(groups))


def _range(group: Group, of: Callable[[Measured], float | None]) -> dict[str, Any] | None:
    values = group.values(of)
    if not values:
        return None
    return {"group": group.name, "y": statistics.fmean(values), "low": min(values),
            "high": max(values)}  # fmt: skip


def _radii(groups: Sequence[Group], colours: dict[str, str], scope: str) -> alt.HConcatChart:
    """Training loss at w + eps: three directions; then test loss along the gradient."""
    m = groups[0].runs[0]["settings"]["m"]
    panels = [
        (f"eps {_NAMES['gradient']}", "gradient", True, "train"),
        (f"every group of {m} along its own", "gradient", False, "train"),
        (f"eps {_NAMES['random']}", "random", True, "train"),
        ("test loss, gradient of all images", "gradient", True, "test"),
    ]
    series = [
        [row for g in groups for row in _against_rho(g, scope, *panel[1:])] for panel in panels
    ]
    limits = _limits(
        [row for rows in series[:3] for row in rows]
    )  # shared, so that the directions can be compared by eye
    unit = "‖eps‖" if scope == "model" else "‖eps_i‖ / ‖w_i‖"
    charts = []
    for (title, *_, split), rows in zip(panels, series, strict=True):
        own = limits if split == "train" else _limits(rows)
        y_title = f"{split} loss"
        charts.append(_curve(rows, colours, title=title, x=f"rho = {unit}", y=y_title, limits=own))
    row = drawing.across(*charts, spacing=72)
    name = {"model": "Scope model: eps = rho g / ‖g‖", "layer": "Scope layer: ‖eps_i‖ = rho ‖w_i‖"}
    return row.properties(title=alt.TitleParams(name[scope], fontSize=14, color=INK))


def _limits(rows: Rows) -> list[float]:
    """Of losses: from 0, so that heights can be compared."""
    return [0.0, 1.05 * max((row["high"] for row in rows), default=1.0)]


def _against_rho(group: Group, scope: str, direction: str, whole: bool, split: str) -> Rows:
    rows = []
    for rho in [0.0, *group.runs[0]["settings"]["rho" if scope == "model" else "layer_rho"]]:
        at = _range(group, _loss(scope, direction, whole, split, rho))
        rows += [at | {"x": rho}] if at else []
    return rows


def _loss(
    scope: str, direction: str, whole: bool, split: str, rho: float
) -> Callable[[Measured], float | None]:
    def of(run: Measured) -> float | None:
        if rho == 0:
            return run["at_w"][split]["loss"]
        for row in run["ascent"]:
            of_all = row["m"] in (None, run["settings"]["samples"])
            at = (row["scope"], row["direction"], row["rho"], of_all)
            if at == (scope, direction, rho, whole):
                return row[split]["loss"]
        return None

    return of


def _curve(
    rows: Rows, colours: dict[str, str], *, title: str, x: str, y: str, limits: list[float]
) -> alt.LayerChart:
    base = alt.Chart(drawing.rows(rows)).encode(
        x=alt.X("x:Q", title=x, axis=alt.Axis(grid=False, tickCount=5, labelFlush=False)),
        color=drawing.colour("group", colours),
    )
    scale = alt.Scale(domain=limits, nice=False, zero=False)
    axis = alt.Y("y:Q", title=y, scale=scale, axis=alt.Axis(tickCount=5, labelFlush=True))
    band = base.mark_area(opacity=0.16).encode(y=alt.Y("low:Q", title=y, scale=scale), y2="high:Q")
    line = base.mark_line(strokeWidth=1.8, point=alt.OverlayMarkDef(size=22)).encode(y=axis)
    return alt.layer(band, line).properties(width=_WIDTH, height=_HEIGHT, title=_small(title))


def _small(title: str) -> alt.TitleParams:
    return alt.TitleParams(title, fontSize=12, fontWeight="normal")


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _eigenvalue(run: Measured) -> float | None:
    return run["eigenvalues"]["largest"][0]


def _trace(run: Measured) -> float | None:
    return run["trace"] and run["trace"]["mean"]


def _lost(bits: int) -> Callable[[Measured], float | None]:
    return lambda run: lost(run, bits)


def _bars(
    groups: Sequence[Group],
    colours: dict[str, str],
    title: str,
    of: Callable[[Measured], float | None],
    text: Callable[[float], str],
    limits: list[float] | None,
) -> alt.LayerChart:
    """A dot for each run, a dash for the mean, and its value; the axis holds 0."""
    means = [row for g in groups if (row := _range(g, of))]
    for row in means:
        row["text"] = text(row["y"]) if len(groups) <= _MOST_VALUES else ""
    single = [{"group": g.name, "y": v} for g in groups for v in g.values(of)]
    names = [g.name for g in groups]
    scale = alt.Scale(zero=True, domain=alt.Undefined if limits is None else limits)
    y = alt.Y("y:Q", title=None, scale=scale, axis=alt.Axis(tickCount=5, labelFlush=True))
    x = alt.X("group:N", sort=names, title=None, axis=None)
    colour = drawing.colour("group", colours)
    base = alt.Chart(drawing.rows(means)).encode(x=x, color=colour)
    zero = alt.Chart(drawing.rows([{"y": 0.0}])).mark_rule(color=GREY, strokeWidth=1).encode(y=y)
    bars = base.mark_rule(strokeWidth=1.5, opacity=0.5).encode(
        y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q"
    )
    dots = alt.Chart(drawing.rows(single)).mark_point(filled=True, size=22, opacity=0.6)
    layers = [
        zero,
        bars,
        dots.encode(x=x, y=y, color=colour),
        base.mark_tick(thickness=2.5, size=24).encode(y=y),
        base.mark_text(dx=15, dy=-7, align="left", fontSize=11).encode(y=y, text="text:N"),
    ]
    layered = alt.layer(*layers)
    return layered.properties(width=_WIDTH, height=_HEIGHT - 50, title=_small(title))


def _lines(groups: Sequence[Group], colours: dict[str, str]) -> alt.HConcatChart:
    """Training and test loss along the two random, filter-normalised directions."""
    places = [(split, number) for split in ("train", "test") for number in range(2)]
    series = [_along(groups, split, number) for split, number in places]
    limits = _limits([row for rows in series for row in rows])
    charts = [
        _curve(rows, colours, title=f"random direction {number + 1}", x="t", y=f"{split} loss",
               limits=limits)
        for (split, number), rows in zip(places, series, strict=True)
    ]  # fmt: skip
    row = drawing.across(*charts, spacing=72)
    name = "Loss at w + t d, d filter-normalised (‖d‖ = ‖w‖ for every filter)"
    return row.properties(title=alt.TitleParams(name, fontSize=14, color=INK))


def _along(groups: Sequence[Group], split: str, number: int) -> Rows:
    rows = []
    for group in groups:
        for i, point in enumerate(group.runs[0]["lines"][number]):
            at = _range(group, _on_line(number, i, split))
            rows += [at | {"x": point["t"]}] if at else []
    return rows


def _on_line(number: int, point: int, split: str) -> Callable[[Measured], float | None]:
    def of(run: Measured) -> float | None:
        points = run["lines"][number]
        return points[point][split]["loss"] if point < len(points) else None

    return of
