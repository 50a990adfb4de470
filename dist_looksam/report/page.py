"""index.html: one page with all charts, tables and scripts, which needs no network.

Its content security policy forbids the browser to load anything.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from dist_looksam.report import drawing
from dist_looksam.report.tables import Table

# The scripts load nothing: the data of every chart are in its specification.
_DRAW = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const options = { renderer: "svg", mode: "vega-lite",
                  actions: { export: true, source: false, compiled: false, editor: false } };
Promise.all(Object.entries(charts).map(([id, spec]) => vegaEmbed("#" + id, spec, options)))
  .then(() => { document.body.dataset.drawn = Object.keys(charts).length; });
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a text, charts in a row, tables, and folded raw text."""

    title: str
    text: str = ""
    charts: Sequence[Any] = ()
    tables: Sequence[Table] = ()
    folded: Mapping[str, str] = field(default_factory=dict)  # title -> text
    second_hand: bool = False


def page(
    *,
    title: str,
    subtitle: str,
    facts: Mapping[str, str],
    notes: Sequence[str],
    sections: Sequence[Section],
) -> str:
    """The HTML of the page. All text is escaped; `facts` is the header."""
    charts: dict[str, Any] = {}
    shown = []
    for section in sections:
        names = [f"chart{len(charts) + i}" for i in range(len(section.charts))]
        charts |= {name: drawing.spec(chart) for name, chart in zip(names, section.charts)}
        shown.append(vars(section) | {"chart_names": names})
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    words = {"title": title, "subtitle": subtitle, "facts": facts, "notes": notes}
    made = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template)
    return made.render(**words, sections=shown, charts=charts, scripts=scripts(_DRAW))


@functools.cache
def scripts(draw: str) -> str:
    """Vega, Vega-Lite and the code `draw`, escaped so that it does not end the script element."""
    bundle = vl_convert.javascript_bundle(draw, vl_version=drawing.VERSION)
    return bundle.replace("</script", "<\\/script").replace("<!--", "\\x3c!--")
