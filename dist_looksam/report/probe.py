"""Changes of g_s, g_h and g_v between looks: figures 1 and 2 of the LookSAM paper.

g_h is the part of g_s along g, g_v the part orthogonal to it. LookSAM assumes that g_v changes
slowly: these charts show whether it does in a run.
Source: Liu et al., arXiv:2203.02714, figures 1 and 2.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair as alt

from dist_looksam import files
from dist_looksam.errors import ConfigError
from dist_looksam.record.rundir import PROBE
from dist_looksam.report import drawing
from dist_looksam.report.drawing import BLUE, GREEN, INK, ORANGE, Rows

_PARTS = {"g_s": ("gs", INK), "g_h": ("gh", BLUE), "g_v": ("gv", ORANGE)}
_MOST_POINTS = 400
_SMOOTH_FROM = 60  # looks; fewer are drawn as they are


def probe_figures(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw `run_dir`/probe.jsonl; returns the paths of two PNG and two HTML files.

    `probe_change` shows the change of each part since the previous probed look, absolute and
    divided by its norm; `probe_norms` the norms, the angle between g_s and g, and, where recorded,
    the cosine between the applied and the intended perturbation. The pages need no network. Raises
    ConfigError where there are fewer than two looks.
    """
    folder = Path(run_dir)
    looks = files.json_lines(folder / PROBE)
    if len(looks) < 2:
        raise ConfigError(
            f"{PROBE} must hold at least two looks, got {len(looks)} in {folder}: let the run go "
            f"on with probing switched on."
        )
    paths = []
    for name, chart in (("probe_change", _change(looks)), ("probe_norms", _norms(looks))):
        paths.append(drawing.save_png(chart, folder / f"{name}.png"))
        paths.append(drawing.save_html(chart, folder / f"{name}.html"))
    return paths


def _lines(looks: Rows, series: Mapping[str, tuple[str, str | None]]) -> Rows:
    """Long rows (step, value, part) of columns; `part: (column, its divisor or None)`."""
    long: Rows = []
    for part, (column, under) in series.items():
        known = [
            {"step": row["step"], "value": row[column] / (row[under] if under else 1), "part": part}
            for row in looks
            if row.get(column) is not None and (under is None or row.get(under))
        ]
        long += _with_means(known)
    return long


def _with_means(known: Rows) -> Rows:
    window = len(known) // 25 if len(known) >= _SMOOTH_FROM else 1
    means = drawing.smoothed([row["value"] for row in known], window=window)
    joined = [row | {"mean": float(mean)} for row, mean in zip(known, means)]
    return drawing.thinned(joined, _MOST_POINTS)


def _panel(
    rows: Rows,
    colours: dict[str, str],
    *,
    title: str,
    axis: str,
    legend: bool = False,
    limits: list[float] | None = None,
) -> Any:
    """One panel: looks as dots, their running means as lines, one colour per part."""
    values = [row["value"] for row in rows]
    if limits is None:
        limits = [0.0, drawing.domain(values)[1]]
    shown = alt.Legend(symbolType="stroke", symbolSize=250) if legend else None
    colour = drawing.colour("part", colours, legend=shown)
    scale = alt.Scale(domain=limits, nice=False, clamp=True)
    tip = [
        alt.Tooltip(f, format=form)
        for f, form in (("part:N", ""), ("step:Q", ",d"), ("value:Q", ".4g"))
    ]
    base = alt.Chart(drawing.rows(rows)).encode(x=drawing.x_step(), color=colour)
    dots = base.mark_circle(size=16, opacity=0.35)
    dots = dots.encode(y=alt.Y("value:Q", title=axis, scale=scale), tooltip=tip)
    lines = base.mark_line(strokeWidth=2.2)
    lines = lines.encode(y=alt.Y("mean:Q", title=axis, scale=scale))
    return alt.layer(dots, lines).properties(width=400, height=270, title=title)


def _change(looks: Rows) -> alt.HConcatChart:
    colours = {part: colour for part, (_, colour) in _PARTS.items()}
    absolute = _lines(looks, {p: (f"{c}_change", None) for p, (c, _) in _PARTS.items()})
    relative = _lines(looks, {p: (f"{c}_change", f"{c}_norm") for p, (c, _) in _PARTS.items()})
    return drawing.across(
        _panel(
            absolute,
            colours,
            title="Absolute",
            axis="‖difference to the previous look‖",
            legend=True,
        ),
        _panel(relative, colours, title="Relative", axis="‖difference‖ / ‖part‖"),
    ).properties(
        title=alt.TitleParams(
            "How far each part of the SAM gradient moves between looks",
            subtitle="g_s = g_h + g_v; g_h lies along g, g_v is orthogonal to it and is what "
            "LookSAM reuses",
            fontSize=18,
        )
    )


def _norms(looks: Rows) -> alt.HConcatChart:
    colours = {"g": GREEN} | {part: colour for part, (_, colour) in _PARTS.items()}
    columns = {"g": ("g_norm", None)} | {p: (f"{c}_norm", None) for p, (c, _) in _PARTS.items()}
    panels = [
        _panel(_lines(looks, columns), colours, title="Norms", axis="‖part‖", legend=True),
        _cosine(looks, "cos_theta", "Angle between g_s and g", "cos θ"),
    ]
    if any(row.get("eps_cosine") is not None for row in looks):
        panels.append(_cosine(looks, "eps_cosine", "Perturbation, applied and intended", "cosine"))
    return drawing.across(*panels).properties(
        title=alt.TitleParams("The two gradients of a look", fontSize=18)
    )


def _cosine(looks: Rows, column: str, title: str, axis: str) -> Any:
    rows = _lines(looks, {axis: (column, None)})
    lowest = min([row["value"] for row in rows], default=0.0)
    floor = 0.0 if lowest >= 0 else -1.0
    panel = _panel(rows, {axis: INK}, title=title, axis=axis, limits=[floor, 1.02])
    return panel.properties(width=300)
