"""The charts of a study: accuracy, cost, time, g_v, ranks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import altair as alt

from dist_looksam.report import drawing, panels, ranking
from dist_looksam.report.panels import Panel, Point
from dist_looksam.report.runs import Run
from dist_looksam.report.statistic import MeanSd
from dist_looksam.report.study import Cell, Label, Study
from dist_looksam.report.tables import mean_sd, percent

_WIDE = 0.25  # of accuracy: more is drawn on a logarithmic axis of the error
_TICKS = (0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.88, 0.85, 0.8, 0.75,
          0.7, 0.6, 0.5, 0.4, 0.2, 0.0)  # fmt: skip

_DASHES = ([1, 0], [6, 3], [2, 2], [9, 2, 2, 2])


def accuracy(study: Study, *, width: int, height: int, hover: bool = False) -> Panel:
    """Top-1 against batch size."""
    values = [run.top1 for c in study.cells.values() for run in c.runs if run.top1 is not None]
    by_error = max(values) - min(values) > _WIDE and max(values) < 1
    images = "held-out training images" if study.finals[0].holdout else "test images"
    points = [
        _accuracy_point(study, label.name, batch, by_error)
        for label in study.labels
        for batch, _ in study.along(label.name)
    ]
    if by_error:
        ends = [1 - value for value in values]
        limits = [min(ends) / 1.06, min(1.0, max(ends) * 1.06)]
        ticks = _apart_on_log([1 - t for t in _TICKS if limits[0] <= 1 - t <= limits[1]], limits)
        scale: dict[str, Any] = {"type": "log", "domain": limits, "reverse": True}
        axis: dict[str, Any] = {"values": ticks, "labelExpr": "format(1 - datum.value, '.1~%')"}
    else:
        margin = 0.06 * (max(values) - min(values)) or 0.02
        limits = [max(0.0, min(values) - margin), min(1.0, max(values) + margin)]
        scale = {"domain": limits}
        axis = {"format": ".1~%", "tickCount": 7}
    return Panel(
        title=f"Top-1 accuracy on {images}" + ", logarithmic in the error" * by_error,
        points=points,
        styles=panels.styles(study.labels),
        x_title="global batch size",
        y_scale=scale,
        y_axis=axis,
        width=width,
        height=height,
        names=True,
        hover=hover,
    )


def spread(study: Study) -> str:
    """A legend of markers, dots and bars."""
    if all(cell.top1.n == 1 for cell in study.cells.values()):
        return "One seed, so no spread is known"
    return "Markers: means; small dots: single seeds; bars: from the lowest to the highest run"


def _apart_on_log(ticks: list[float], limits: list[float]) -> list[float]:
    """Ticks of a logarithmic axis, without those too near to a neighbour."""
    chosen: list[float] = []
    ratio = (limits[1] / limits[0]) ** (1 / 14)
    for tick in sorted(ticks):
        if not chosen or tick / chosen[-1] >= ratio:
            chosen.append(tick)
    return chosen


def _accuracy_point(study: Study, label: str, batch: int, by_error: bool) -> Point:
    cell = study.cells[label, batch]
    top1 = cell.top1

    def at(top1: float) -> float:
        return 1 - top1 if by_error else top1

    def tip(runs: Sequence[Run], seed: str, top1: str) -> dict[str, str]:
        facts = {"method": label, "batch": f"{batch:,}", "seed": seed, "top1": top1}
        taken = Cell(runs=tuple(runs)).numbers("seconds")
        time = mean_sd(taken, 1) if taken else "not known"
        return facts | _settings(runs) | ({"seconds": time} if study.quiet else {})

    # A single seed equals its mean and gets its own mark only where it is in trouble.
    seeds = [
        (at(run.top1), tip([run], str(run.seed), _run_top1(run)), bool(run.trouble))
        for run in cell.runs
        if run.top1 is not None and (top1.n > 1 or run.trouble)
    ]
    names = ", ".join(str(run.seed) for run in cell.runs)
    over = tip(cell.runs, names if top1.n == 1 else f"mean of {names}", f"{percent(top1)} %")
    return panels.point(label, batch, MeanSd(tuple(map(at, top1.values))), over, seeds)


def _run_top1(run: Run) -> str:
    assert run.top1 is not None
    return f"{100 * run.top1:.2f} %" + (f" ({run.trouble})" if run.trouble else "")


def _settings(runs: Sequence[Run]) -> dict[str, str]:
    tip = {}
    for name in ("lr", "rho"):
        values = {v: None for run in runs if (v := run.setting(name)) is not None}
        words = [f"{v:g}" if isinstance(v, int | float) else str(v) for v in values]
        tip[name] = ", ".join(words) or "none"
    scaling = {run.setting("lr_scaling") for run in runs} - {None, "none"}
    if scaling:  # lr is meant for that batch size
        batches = {run.setting("lr_base_batch") for run in runs}
        tip["lr"] += f" at batch {', '.join(map(str, batches))}, {', '.join(map(str, scaling))}"
    return tip


def _by_batch(study: Study, value: Any, unit: str, digits: int) -> list[Point]:
    """Points of `value`(label, batch, cell) -> MeanSd or None, one a cell."""
    points = []
    for label in study.labels:
        for batch, cell in study.along(label.name):
            mean = value(label, batch, cell)
            if mean is not None and min(mean.values) > 0:  # an axis may be logarithmic
                tip = {"method": label.name, "batch": f"{batch:,}", unit: mean_sd(mean, digits)}
                points.append(panels.point(label.name, batch, mean, tip | {"n": str(mean.n)}))
    return points


def _over_base(study: Study, label: Label, batch: int, name: str) -> MeanSd | None:
    return None if label.base_label == label.name else study.cost(label, batch, name)


def lesser(study: Study, *, width: int, height: int, hover: bool = False) -> list[Panel]:
    """Panels of time over the base's, seconds (both of a quiet machine) and g_v, where known."""
    common: dict[str, Any] = {
        "styles": panels.styles(study.labels),
        "x_title": "global batch size",
        "width": width,
        "height": height,
        "hover": hover,
        "names": hover,
    }
    ratio = _by_batch(study, lambda x, b, _: _over_base(study, x, b, "seconds"), "time / base", 2)
    reach = (1.0,) if len(study.batches) > 1 else (0.9, 1.1)  # a line through one point has none
    passes = [
        {"x": batch * times, "y": over.mean, "line": label.name}
        for label in study.labels
        for batch in study.batches
        for times in reach
        if (over := _over_base(study, label, batch, "passes"))
    ]
    seconds = _by_batch(study, lambda _label, _b, c: c.numbers("seconds"), "seconds", 1)
    new = _by_batch(study, lambda _label, _b, c: c.numbers("gv_ratio"), "gv_ratio", 3)
    log = {"type": "log"}
    plain = {"format": "~g", "tickCount": 5}
    every = [
        Panel(
            title="Time over the base's (dotted: passes)",
            points=ratio,
            rule=1.0,
            diagonals=passes,
            **common,
        ),
        Panel(title="Seconds to train", points=seconds, y_scale=log, y_axis=plain, **common),
        Panel(title="‖g_v‖ / ‖g‖ at looks", points=new, y_scale=log, y_axis=plain, **common),
    ]
    return [panel for panel in every[0 if study.quiet else 2 :] if panel.points]


def picture(study: Study, title: str, subtitle: list[str]) -> alt.VConcatChart:
    """scaling.png: accuracy above, costs below."""
    below = [panel.chart() for panel in lesser(study, width=250, height=170)]
    above: alt.LayerChart | alt.HConcatChart
    if len(study.batches) == 1:
        above = ranking.chart(study, width=700)
    else:
        above, note = _families(study)
        subtitle = [*subtitle, *note]
    chart = alt.vconcat(above, *([drawing.across(*below)] if below else []), spacing=26)
    return chart.properties(title=alt.TitleParams(title, subtitle=subtitle, fontSize=18))


def _families(study: Study) -> tuple[alt.HConcatChart, list[str]]:
    """A panel for each base and its methods, and the line that says what all of them show."""
    every = accuracy(study, width=0, height=330)
    bases = list(dict.fromkeys(label.base for label in study.labels))
    width = max(300, (840 - 130 * len(bases)) // len(bases))
    families = [
        replace(
            every,
            width=width,
            points=[p for p in every.points if p.label in names],
            title=every.title if len(bases) == 1 else f"Based on {base}",
        )
        for base in bases
        if (names := {label.name for label in study.labels if label.base == base})
    ]
    spacing = 50 + 8 * max(len(label.name) for label in study.labels)  # for names at the ends
    row = drawing.across(*(panel.chart() for panel in families), spacing=spacing)
    return row, [every.title] * (len(bases) > 1)


def series(study: Study) -> dict[str, list[tuple[int, MeanSd]]]:
    """Images a second by ranks: one line per method and batch, or per method and batch / ranks.

    A line needs two numbers of ranks. {} if the machine was not quiet.
    """
    lines: dict[str, dict[int, list[float]]] = {}
    for run in study.finals if study.quiet else ():
        if run.images_per_s and run.world_size:
            names = [f"{run.label}, batch {run.batch:,}"]
            if run.batch % run.world_size == 0:
                names.append(f"{run.label}, {run.batch // run.world_size:,} a rank")
            for name in names:
                lines.setdefault(name, {}).setdefault(run.world_size, []).append(run.images_per_s)
    return {
        name: [(count, MeanSd(tuple(rates))) for count, rates in sorted(line.items())]
        for name, line in lines.items()
        if len(line) > 1
    }


def ranks(
    lines: dict[str, list[tuple[int, MeanSd]]], study: Study, *, hover: bool = False
) -> Panel:
    """Speed-up against ranks, dotted where twice the ranks are twice as fast."""
    own = panels.styles(study.labels)
    points, ideal, kinds = [], [], {}
    for i, (name, line) in enumerate(lines.items()):
        label = max((label for label in own if name.startswith(label)), key=len)
        kinds[name] = replace(own[label], dash=_DASHES[i % len(_DASHES)])
        for count, rate in line:
            tip = {"line": name, "ranks": f"{count:,}", "images/s": mean_sd(rate, 1)}
            points.append(panels.point(name, count, rate, tip | {"n": str(rate.n)}))
            ideal.append({"x": count, "y": line[0][1].mean * count / line[0][0], "line": name})
    return Panel(
        title="Images a second by ranks (dotted: ideal)",
        points=points,
        styles=kinds,
        x_title="ranks",
        width=560,
        height=300,
        y_scale={"type": "log"},
        y_axis={"format": "~s"},
        diagonals=ideal,
        names=True,
        hover=hover,
    )
