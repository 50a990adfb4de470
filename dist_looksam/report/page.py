"""index.html: one page with every chart and table, its scripts inside, that asks no network.

Its content security policy lets the browser load nothing from anywhere, so it stays that way.
"""

import functools
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import vl_convert

from dist_looksam.report import drawing
from dist_looksam.report.tables import Table

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:"
)
_STYLE = """
body { font: 15px/1.5 "Liberation Sans", Arial, sans-serif; color: #23303d; margin: 0 auto;
       max-width: 1120px; padding: 24px 28px 60px; }
h1 { font-size: 26px; margin: 0 0 6px; } h2 { font-size: 20px; margin: 38px 0 8px; }
h3 { font-size: 16px; margin: 26px 0 4px; } p { margin: 4px 0 12px; max-width: 85ch; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 13px;
     background: #f4f6f8; padding: 12px 16px; border-radius: 6px; }
dt { color: #66727e; } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 12.5px/1.45 "Liberation Mono", Menlo, monospace; }
pre { background: #f4f6f8; padding: 12px 16px; border-radius: 6px; overflow-x: auto; }
.answer { font-size: 16px; max-width: 100ch; border-left: 4px solid #0072b2; padding-left: 16px; }
.notes { border-left: 4px solid #d55e00; padding-left: 34px; } .notes li { margin: 3px 0; }
.second-hand { border: 2px dashed #b8c2cc; border-radius: 6px; padding: 4px 18px 14px; }
.wide, .chart { overflow-x: auto; } .row { display: flex; flex-wrap: wrap; gap: 8px 24px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid #e3e8ed;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid #b8c2cc; font-weight: 600; }
#vg-tooltip-element { font: 13px/1.4 "Liberation Sans", Arial, sans-serif; }
footer { margin-top: 46px; color: #66727e; font-size: 13px; }
"""
# The scripts' own loader is asked for nothing: every chart's data are inside its specification.
_DRAW = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const options = { renderer: "svg", mode: "vega-lite",
                  actions: { export: true, source: false, compiled: false, editor: false } };
Promise.all(Object.entries(charts).map(([id, spec]) => vegaEmbed("#" + id, spec, options)))
  .then(() => { document.body.dataset.drawn = Object.keys(charts).length; });
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, what is said, charts in a row, tables, and raw text that unfolds."""

    title: str
    text: str = ""
    charts: Sequence[Any] = ()
    tables: Sequence[Table] = ()
    folded: Mapping[str, str] | None = None  # what it is -> text
    second_hand: bool = False


def page(
    *,
    title: str,
    subtitle: str,
    facts: Mapping[str, str],
    answer: str,
    notes: Sequence[str],
    sections: Sequence[Section],
) -> str:
    """The page's text. All words are escaped; `facts` is the header: what was run, where, when."""
    e = html.escape
    charts: dict[str, Any] = {}
    body = [f"<h1>{e(title)}</h1>", f"<p>{e(subtitle)}</p>"]
    rows = "".join(f"<dt>{e(name)}</dt><dd>{e(text)}</dd>" for name, text in facts.items())
    body.append(f"<dl>{rows}</dl>")
    body.append(f'<h2>In words</h2><p class="answer">{e(answer)}</p>')
    if notes:
        items = "".join(f"<li>{e(note)}</li>" for note in notes)
        body.append(f'<h2>Read this with it</h2><ul class="notes">{items}</ul>')
    body += [_section(section, charts) for section in sections]
    # In a script element only "</" could end it early.
    data = json.dumps(charts, separators=(",", ":")).replace("</", "<\\/")
    scripts = _scripts()
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<link rel="icon" href="data:,"><title>{e(title)}</title>',
            f"<style>{_STYLE}</style></head><body>",
            *body,
            "<footer>Hover over a point for its run; the hovered method stands out.</footer>",
            f'<script id="charts" type="application/json">{data}</script>',
            f"<script>{scripts}</script></body></html>\n",
        ]
    )


@functools.cache
def _scripts() -> str:
    """Vega, Vega-Lite and what draws with them; nothing in it ends the script element early."""
    bundle = vl_convert.javascript_bundle(_DRAW, vl_version=drawing.VERSION)
    return bundle.replace("</script", "<\\/script")


def _section(section: Section, charts: dict[str, Any]) -> str:
    e = html.escape
    parts = [f"<h2>{e(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{e(section.text)}</p>")
    if section.charts:
        parts.append('<div class="row">')
        for chart in section.charts:
            name = f"chart{len(charts)}"
            charts[name] = drawing.spec(chart)
            parts.append(f'<div class="chart" id="{name}"></div>')
        parts.append("</div>")
    parts += [table.html() for table in section.tables]
    for name, text in (section.folded or {}).items():
        parts.append(f"<details><summary>{e(name)}</summary><pre>{e(text)}</pre></details>")
    kind = "second-hand" if section.second_hand else "part"
    return f'<section class="{kind}">{"".join(parts)}</section>'
