"""`dist-looksam curves` and `dist-looksam probe`: pictures of finished or running runs."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dist_looksam.arguments import Parser
from dist_looksam.report import curves, probe_figures


def draw_curves(argv: Sequence[str]) -> int:
    """Draw curves.png of every run directory in `argv`. Raises ConfigError."""
    return _draw("curves", "Draw curves.png from metrics.jsonl.", argv, lambda run: [curves(run)])


def draw_probe(argv: Sequence[str]) -> int:
    """Draw what --probe_every recorded of every run directory in `argv`. Raises ConfigError."""
    text = "Draw how g_s, g_h and g_v move between looks, from probe.jsonl (--probe_every)."
    return _draw("probe", text, argv, probe_figures)


def _draw(name: str, text: str, argv: Sequence[str], draw: Callable[[str], Iterable[Path]]) -> int:
    parser = Parser(prog=f"dist-looksam {name}", description=text)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory (--out)")
    for run in parser.parse_args(argv).runs:
        for path in draw(run):
            print(path)
    return 0
