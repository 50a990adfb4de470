"""What is drawn of a study: accuracy, cost, time, g_v, ranks."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dist_looksam.report import drawing, panels
from dist_looksam.report.panels import Panel, Point, point
from dist_looksam.report.runs import Run
from dist_looksam.report.study import Amount, Cell, Label, Study
from dist_looksam.report.tables import amount, percent

_WIDE = 0.25  # of accuracy: more is drawn on a logarithmic axis of the error
_TICKS = (0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.88, 0.85, 0.8, 0.75,
          0.7, 0.6, 0.5, 0.4, 0.2, 0.0)  # fmt: skip


def accuracy(study: Study, *, width: int, height: int, hover: bool = False) -> Panel:
    """Top-1 against batch size."""
    values = [run.top1 for c in study.cells.values() for run in c.runs if run.top1 is not None]
    by_error = max(values) - min(values) > _WIDE and max(values) < 1
    points = [
        _accuracy_point(label.name, batch, cell, by_error)
        for label in study.labels
        for batch, cell in study.along(label.name)
    ]
    if by_error:
        floor = 0.5 * (1 - max(values))  # a bar must not reach an error of 0
        ends = [v for p in points for v in (max(p.low, floor), p.high, *(s[0] for s in p.seeds))]
        limits = [min(ends) / 1.06, min(1.0, max(ends) * 1.06)]
        ticks = _apart_on_log([1 - t for t in _TICKS if limits[0] <= 1 - t <= limits[1]], limits)
        scale: dict[str, Any] = {"type": "log", "domain": limits, "reverse": True}
        axis: dict[str, Any] = {"values": ticks, "labelExpr": "format(1 - datum.value, '.1~%')"}
    else:
        spread = [v for p in points for v in (p.low, p.high, *(s[0] for s in p.seeds))]
        margin = 0.06 * (max(spread) - min(spread)) or 0.02
        limits = [max(0.0, min(spread) - margin), min(1.0, max(spread) + margin)]
        scale = {"domain": limits}
        axis = {"format": ".1~%", "tickCount": 7}
    return Panel(
        title="Top-1 accuracy on held-out images" + ", logarithmic in the error" * by_error,
        points=points,
        looks=panels.looks(study.labels),
        x_title="global batch size",
        y_scale=scale,
        y_axis=axis,
        width=width,
        height=height,
        names=True,
        hover=hover,
    )


def spread(study: Study) -> str:
    """What bars and dots are."""
    if all(cell.top1.n == 1 for cell in study.cells.values()):
        return "One seed, so no spread is known"
    return "Bars: ±1 sd over seeds; small dots: single seeds"


def _apart_on_log(ticks: list[float], limits: list[float]) -> list[float]:
    """Ticks of a logarithmic axis, without those that would touch a neighbour."""
    kept: list[float] = []
    ratio = (limits[1] / limits[0]) ** (1 / 14)
    for tick in sorted(ticks):
        if not kept or tick / kept[-1] >= ratio:
            kept.append(tick)
    return kept


def _accuracy_point(label: str, batch: int, cell: Cell, by_error: bool) -> Point:
    def at(top1: float) -> float:
        return 1 - top1 if by_error else top1

    top1 = cell.top1
    # A single seed is its own mean, and needs a mark of its own only where it is in trouble.
    seeds = [
        (at(run.top1), _tip(run), bool(run.trouble))
        for run in cell.runs
        if run.top1 is not None and (top1.n > 1 or run.trouble)
    ]
    names = ", ".join(str(run.seed) for run in cell.runs)
    tip = {
        "method": label,
        "batch": f"{batch:,}",
        "seed": names if top1.n == 1 else f"mean of {names}",
        "top1": f"{percent(top1)} %",
        **_settings(cell.runs),
        "seconds": _told(cell.amount("seconds"), 1),
    }
    return point(label, batch, Amount(at(top1.mean), top1.sd, top1.n), tip, seeds)


def _told(value: Amount | None, digits: int) -> str:
    return amount(value, digits) if value else "not known"


def _settings(runs: Sequence[Run]) -> dict[str, str]:
    told = {}
    for name in ("lr", "rho"):
        values = {v: None for run in runs if (v := run.setting(name)) is not None}
        words = [f"{v:g}" if isinstance(v, int | float) else str(v) for v in values]
        told[name] = ", ".join(words) or "none"
    scaling = {run.setting("lr_scaling") for run in runs} - {None, "none"}
    if scaling:  # lr is of the batch that it was found at
        batches = {run.setting("lr_base_batch") for run in runs}
        told["lr"] += f" at batch {', '.join(map(str, batches))}, {', '.join(map(str, scaling))}"
    return told


def _tip(run: Run) -> dict[str, str]:
    assert run.top1 is not None
    tip = {
        "method": run.label,
        "batch": f"{run.batch:,}",
        "seed": str(run.seed),
        "top1": f"{100 * run.top1:.2f} %" + (f" ({run.trouble})" if run.trouble else ""),
        **_settings([run]),
        "seconds": "not known" if run.seconds is None else f"{run.seconds:,.1f}",
    }
    return tip


def _by_batch(study: Study, value: Any, told: str, digits: int) -> list[Point]:
    """Points of `value`(label, batch, cell) -> Amount or None, one a cell."""
    points = []
    for label in study.labels:
        for batch, cell in study.along(label.name):
            found = value(label, batch, cell)
            if found is not None and found.mean > 0:
                tip = {"method": label.name, "batch": f"{batch:,}", told: amount(found, digits)}
                points.append(point(label.name, batch, found, tip | {"n": str(found.n)}))
    return points


def _over_base(study: Study, label: Label, batch: int, name: str) -> Amount | None:
    return None if label.base_label == label.name else study.cost(label, batch, name)


def lesser(study: Study, *, width: int, height: int, hover: bool = False) -> list[Panel]:
    """Time over the base's, seconds, and g_v, each where it is known."""
    common: dict[str, Any] = {
        "looks": panels.looks(study.labels),
        "x_title": "global batch size",
        "width": width,
        "height": height,
        "hover": hover,
        "names": hover,
        "short": True,
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
    seconds = _by_batch(study, lambda _label, _b, c: c.amount("seconds"), "seconds", 1)
    new = _by_batch(study, lambda _label, _b, c: c.amount("gv_ratio"), "gv_ratio", 3)
    log = {"type": "log"}
    plain = {"format": "~g", "tickCount": 5}
    found = [
        Panel(
            title="Time / base method's (dotted: passes)",
            points=ratio,
            rule=1.0,
            diagonals=passes,
            **common,
        ),
        Panel(title="Seconds to train", points=seconds, y_scale=log, y_axis=plain, **common),
        Panel(title="‖g_v‖ / ‖g‖ at looks", points=new, y_scale=log, y_axis=plain, **common),
    ]
    return [panel for panel in found if panel.points]


def picture(study: Study, title: str, subtitle: list[str]) -> alt.VConcatChart:
    """scaling.png: accuracy above, what it costs below."""
    top = accuracy(study, width=740, height=360).chart()
    below = [panel.chart() for panel in lesser(study, width=250, height=170)]
    chart = alt.vconcat(top, *([drawing.across(*below)] if below else []), spacing=26)
    return chart.properties(title=alt.TitleParams(title, subtitle=subtitle, fontSize=18))


def series(runs: Sequence[Run]) -> dict[str, list[tuple[int, Amount]]]:
    """Images a second by ranks: lines of one method and batch, or of one share a rank.

    A line needs two numbers of ranks. Weak scaling (the same batch / ranks) is its own line.
    """
    lines: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        if run.images_per_s and run.world_size:
            names = [f"{run.label}, batch {run.batch:,}"]
            if run.batch % run.world_size == 0:
                names.append(f"{run.label}, {run.batch // run.world_size:,} a rank")
            for name in names:
                lines.setdefault(name, {}).setdefault(run.world_size, []).append(run.images_per_s)
    return {
        name: [(count, Amount.of(rates)) for count, rates in sorted(line.items())]
        for name, line in lines.items()
        if len(line) > 1
    }


def ranks(
    lines: dict[str, list[tuple[int, Amount]]], study: Study, *, hover: bool = False
) -> Panel:
    """Speed-up against ranks, dotted where twice the ranks are twice as fast."""
    own = panels.looks(study.labels)
    points, ideal, kinds = [], [], {}
    for i, (name, line) in enumerate(lines.items()):
        label = next(
            label for label in sorted(own, key=len, reverse=True) if name.startswith(label)
        )
        kinds[name] = panels.Look(own[label].colour, panels.SHAPES[i % len(panels.SHAPES)], [1, 0])
        for count, rate in line:
            tip = {"line": name, "ranks": f"{count:,}", "images/s": amount(rate, 1)}
            points.append(point(name, count, rate, tip | {"n": str(rate.n)}))
            ideal.append({"x": count, "y": line[0][1].mean * count / line[0][0], "line": name})
    return Panel(
        title="Images a second by ranks (dotted: ideal)",
        points=points,
        looks=kinds,
        x_title="ranks",
        width=560,
        height=300,
        y_scale={"type": "log"},
        y_axis={"format": "~s"},
        diagonals=ideal,
        names=True,
        hover=hover,
        dodge=False,
    )
