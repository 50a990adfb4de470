"""Accuracy of the methods of a study with one batch size: a row each, the best on top."""

import altair as alt

from dist_looksam.report import drawing, panels
from dist_looksam.report.study import Study
from dist_looksam.report.tables import percent

_ROW = 30  # pixels


def chart(study: Study, *, width: int) -> alt.LayerChart:
    """Means with bars from the lowest to the highest run, seeds as dots, numbers at the right."""
    (batch,) = study.batches
    kinds = panels.styles(study.labels)
    cells = {label.name: study.cells[label.name, batch] for label in study.labels}
    best = study.best(batch)
    means: drawing.Rows = []
    seeds: drawing.Rows = []
    for name in best:
        top1 = cells[name].top1
        text = f"{percent(top1)} %" + " !" * cells[name].troubled
        ends = {"low": min(top1.values), "high": max(top1.values), "x": top1.mean}
        means.append({"method": name, "top1": text, "runs": str(top1.n), **ends})
        seeds += [
            {"method": name, "seed": str(seed), "top1": f"{100 * x:.2f} %", "x": x}
            for seed, x in cells[name].by_seed.items()
            if top1.n > 1
        ]
    least, most = min(row["low"] for row in means), max(row["high"] for row in means)
    margin = 0.05 * (most - least) or 0.02
    domain = [max(0.0, least - margin), min(1.0, most + margin)]
    x, low = (
        alt.X(
            f"{name}:Q",
            title="top-1 accuracy",
            scale=alt.Scale(domain=domain, nice=False),
            axis=alt.Axis(format=".1~%", tickCount=7),
        )
        for name in ("x", "low")
    )
    y = alt.Y("method:N", title=None, sort=best, axis=alt.Axis(labelFontSize=12, labelLimit=300))
    colour = drawing.colour("method", {name: kinds[name].colour for name in cells})
    shapes = alt.Scale(domain=list(cells), range=[kinds[name].shape for name in cells])
    base = alt.Chart(drawing.rows(means)).encode(y=y, color=colour)
    bars = base.mark_rule(strokeWidth=1.5, strokeOpacity=0.5).encode(x=low, x2="high:Q")
    marks = base.mark_point(size=70, strokeWidth=1.9, fill="white", fillOpacity=0.01, opacity=1)
    marks = marks.encode(
        x=x,
        shape=alt.Shape("method:N", scale=shapes, legend=None),
        tooltip=["method:N", "top1:N", "runs:N"],
    )
    texts = base.mark_text(align="left", dx=8, fontSize=12).encode(
        x=alt.value(width), text="top1:N"
    )
    dots = alt.Chart(drawing.rows(seeds)).mark_point(filled=True, size=14, opacity=0.6)
    dots = dots.encode(x=x, y=y, color=colour, tooltip=["method:N", "seed:N", "top1:N"])
    layers = [bars, marks, texts] + ([dots] if seeds else [])
    return alt.layer(*layers).properties(width=width, height=_ROW * len(best))
