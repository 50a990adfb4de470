"""`dist-looksam curves`, `probe` and `report`: charts of single runs, and of many compared."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dist_looksam.cli.arguments import Parser, check_new_file
from dist_looksam.errors import ConfigError, RunError
from dist_looksam.report import curves, probe_figures
from dist_looksam.report.overlaid import overlaid


def draw_curves(argv: Sequence[str]) -> int:
    """Draw curves.png of a run directory, or several over each other. Raises ConfigError."""
    text = "Draw curves.png from metrics.jsonl; several runs are drawn over each other."
    parser = _parser("curves", text)
    parser.add_argument("--out", type=Path, help="picture of several runs; default ./curves.png")
    flags = parser.parse_args(argv)
    if len(flags.runs) == 1 and flags.out is None:
        return _draw(flags.runs, lambda run: [curves(run)])
    folders, out = [Path(run) for run in flags.runs], flags.out or Path("curves.png")
    check_new_file("out", out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"out must end in .png, the only format that is drawn, got {out}.")
    return _draw([", ".join(flags.runs)], lambda _: [overlaid(folders, out)])


def draw_probe(argv: Sequence[str]) -> int:
    """Draw probe.jsonl of every run directory in `argv`. Raises ConfigError."""
    text = "Draw the changes and norms of g_s, g_h and g_v from probe.jsonl (--probe_every)."
    return _draw(_parser("probe", text).parse_args(argv).runs, probe_figures)


def _parser(name: str, text: str) -> Parser:
    parser = Parser(prog=f"dist-looksam {name}", description=text)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory (--out)")
    return parser


def _draw(runs: Sequence[str], draw: Callable[[str], Iterable[Path]]) -> int:
    for run in runs:
        try:
            paths = list(draw(run))
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{run} holds lines that are not of this program, got {error!r}; give what "
                f"train.py --out wrote."
            ) from error
        print(*paths, sep="\n")
    return 0


def draw_report(argv: Sequence[str]) -> int:
    """Compare the runs of folders: tables on the terminal, files in --out. Raises ConfigError."""
    from dist_looksam.report import comparison, reference

    flags = _report_parser().parse_args(argv)
    if not (math.isfinite(flags.points) and flags.points > 0):
        raise ConfigError(f"points must be > 0 and finite, got {flags.points:g}; 1 is the default.")
    files = [*([reference.PAPER] if flags.paper else []), *flags.reference]
    first = Path(flags.folders[0])
    out = flags.out or (first.parent if first.is_file() else first) / "report"
    try:
        done = comparison.report(
            flags.folders,
            out=out,
            points=flags.points,
            references=[reference.read(file) for file in files],
            command=["dist-looksam", "report", *argv],
        )
    except OSError as error:
        raise RunError(f"the report cannot be written to {out}: {error.strerror}.") from None
    print(done.text)
    for path in done.paths:
        print(path)
    return 0


def _report_parser() -> Parser:
    parser = Parser(
        prog="dist-looksam report",
        description="Compare accuracy, time and cost of all runs below the folders by batch size. "
        "Writes scaling.png, index.html (works offline), report.md and report.csv.",
    )
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", help="folder of runs or of a sweep, or a report.csv"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the report; default report/ in the first DIR"
    )
    parser.add_argument(
        "--points",
        type=float,
        default=1.0,
        help="fall of top-1 in %% at which a method ends; default 1",
    )
    parser.add_argument(
        "--reference", metavar="FILE.yaml", action="append", default=[],
        help="published figures to show separately, marked second-hand",
    )  # fmt: skip
    parser.add_argument(
        "--paper", action="store_true", help="show the LookSAM paper's figures, marked second-hand"
    )
    return parser
