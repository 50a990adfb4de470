"""confusion.png: which classes trained weights take for which."""

from typing import Any

import altair as alt

from dist_looksam.report import drawing
from dist_looksam.report.drawing import INK

_MOST = 30  # classes that can be read in one picture


def picture(found: dict[str, Any]) -> alt.LayerChart:
    """The share of each true class (row) by answer (column), of the content of eval.json.

    Of more than 30 classes, the 30 with the most mistakes.
    """
    every = [row for row in found["classes"] if row["images"]]
    worst = sorted(every, key=lambda row: row["answers"].get(row["class"], 0) - row["images"])
    chosen = {row["class"] for row in worst[:_MOST]}
    names = [row["class"] for row in every if row["class"] in chosen]
    cells = [
        {"true": row["class"], "answer": answer, "share": number / row["images"], "n": number}
        for row in every
        for answer, number in row["answers"].items()
        if row["class"] in chosen and answer in chosen
    ]
    which = "" if len(names) == len(every) else f", the {_MOST} with the most mistakes"
    facts = [
        f"top1 {found['top1']:.2%}",
        f"{found['images']:,} images",
        f"{len(every)} classes{which}",
        f"batch {found['batch_size']:,}",
        f"seed {found['seed']}",
    ]
    title = alt.TitleParams(
        f"{found['optimizer']} on {found['data']}: confusion", subtitle="  ·  ".join(facts)
    )
    x = alt.X("answer:N", title="answer", sort=names, axis=alt.Axis(orient="top", labelAngle=-45))
    y = alt.Y("true:N", title="true class", sort=names)
    scale = alt.Scale(domain=[0, 1], scheme="blues")
    chart = alt.Chart(drawing.rows(cells))
    squares = chart.mark_rect().encode(
        x=x, y=y, color=alt.Color("share:Q", scale=scale, legend=None)
    )
    light = alt.condition("datum.share > 0.5", alt.value("white"), alt.value(INK))
    counts = chart.mark_text(fontSize=10).encode(x=x, y=y, text="n:Q", color=light)
    side = 34 * len(names)
    return alt.layer(squares, counts).properties(width=side, height=side, title=title)
