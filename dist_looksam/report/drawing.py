"""Shared by all charts: colours, thinning of long series, smoothing, PNG and offline HTML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import altair as alt
import numpy as np
import vl_convert
from scipy import ndimage

Rows: TypeAlias = list[dict[str, Any]]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
INK, GREY = "#23303d", "#8b98a5"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b0609a"

VERSION = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
_CONFIG = {
    "background": "white",
    "font": "Liberation Sans, Arial, sans-serif",
    "padding": 18,
    "view": {"stroke": None},
    "axis": {
        "domainColor": "#b8c2cc",
        "gridColor": "#e9edf1",
        "labelColor": "#4a5764",
        "labelFontSize": 11,
        "tickColor": "#b8c2cc",
        "titleColor": "#4a5764",
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "axisY": {"minExtent": 38},  # so that the panels of two rows begin at one line
    "title": {
        "anchor": "start",
        "frame": "group",
        "color": INK,
        "fontSize": 14,
        "fontWeight": 600,
        "offset": 10,
        "subtitleColor": "#66727e",
        "subtitleFontSize": 12,
    },
    "legend": {
        "labelColor": INK,
        "labelFontSize": 12,
        "labelLimit": 300,
        "fillColor": "#ffffffd0",
        "offset": 2,
        "orient": "top-right",
        "padding": 6,
        "symbolOpacity": 1,
        "symbolStrokeWidth": 2.5,
        "title": None,
    },
}


def x_step(last: int | None = None) -> alt.X:
    """The axis of steps, from 0 to `last` for panels that share it, else to the end of the data."""
    limits = alt.Undefined if last is None else [0, max(1, last)]
    axis = alt.Axis(format=",d", grid=False, tickMinStep=1, tickCount=6)
    return alt.X("step:Q", title="step", axis=axis, scale=alt.Scale(nice=False, domain=limits))


def across(*panels: Any, spacing: int = 72) -> alt.HConcatChart:
    """Panels side by side, each with its own colours; plot areas, not labels, are aligned."""
    row = alt.hconcat(*panels, bounds="flush", spacing=spacing)
    return row.resolve_scale(color="independent")


def rows(chart_rows: Rows) -> alt.InlineData:
    """Rows as a chart's data."""
    return alt.InlineData(values=chart_rows)


def colour(column: str, colours: dict[str, str], *, legend: Any = None) -> alt.Color:
    """A column of names as colours, by a table of them."""
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    return alt.Color(f"{column}:N", scale=scale, legend=legend)


def thinned(series: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, with the first and the last."""
    if len(series) <= most:
        return list(series)
    return [series[i] for i in np.linspace(0, len(series) - 1, most).round().astype(int)]


def smoothed(values: Sequence[float], *, window: int) -> np.ndarray:
    """[n] Gaussian-weighted means over about `window` items around each one, fewer at the ends.

    Each item is first replaced by the median of itself and its four neighbours, against outliers.
    """
    y = np.asarray(values, dtype=float)
    if window < 2 or len(y) < 5:
        return y
    y = ndimage.median_filter(y, size=5, mode="nearest")
    gauss = {"sigma": window / 2, "mode": "constant"}
    return ndimage.gaussian_filter1d(y, **gauss) / ndimage.gaussian_filter1d(
        np.ones_like(y), **gauss
    )


def domain(values: Sequence[float], *, log: bool = False) -> list[float]:
    """Limits of the values without the outer 1 %, so that one spike does not flatten the rest."""
    y = np.asarray([v for v in values if not log or v > 0], dtype=float)
    if not len(y):
        return [1.0, 10.0] if log else [0.0, 1.0]
    low, high = np.quantile(y, [0.005, 0.995])
    if log:
        return [float(low / 1.3), float(high * 1.3)]
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return [float(low - margin), float(high + margin)]


def save_png(chart: alt.TopLevelMixin, path: Path) -> Path:
    """Write the chart at twice screen resolution."""
    path.write_bytes(vl_convert.vegalite_to_png(spec(chart), vl_version=VERSION, scale=2))
    return path


def save_html(chart: alt.TopLevelMixin, path: Path) -> Path:
    """Write the chart as one page with its scripts inside, which needs no network."""
    page = vl_convert.vegalite_to_html(spec(chart), vl_version=VERSION, bundle=True)
    path.write_text(page, encoding="utf-8")
    return path


def spec(chart: Any) -> dict[str, Any]:
    """The chart as Vega-Lite, in the style of all charts."""
    # Checking thousands of points against the schema takes ten times as long as drawing them.
    return chart.configure(**_CONFIG).to_dict(validate=False)
