"""List the recipes of launch/recipes/, or check them or other files of settings."""

from collections.abc import Sequence
from pathlib import Path

from .. import project
from ..cli import table
from ..cli.arguments import Parser
from ..errors import ConfigError
from ..settings import config
from . import dryrun
from .dryrun import SHARE

_COLUMNS = (
    "recipe",
    "steps",
    "warm-up",
    "lr",
    "rho",
    "precision",
    "passes",
    "GPUs",
    "GPU-hours",
    "MB/s a node",
    "cores a node",
)


def found() -> list[Path]:
    """All recipes, sorted by model, method and batch size. ConfigError where there are none."""
    paths = sorted(project.RECIPES.glob("*.yaml"), key=_order)
    if not paths:
        raise ConfigError(
            f"recipes must be in {project.RECIPES}, got none there; install the package again."
        )
    return paths


def _order(path: Path) -> tuple[str, int]:
    name, _, batch = path.stem.rpartition("-")
    return name, int(batch.removesuffix("k")) if batch.removesuffix("k").isdigit() else 0


def checked(path: Path, ranks: int | None = None) -> dryrun.Outcome:
    """The result of --dry_run for a file, by default at its own ranks. Raises ConfigError."""
    settings = config.parse(["--config", str(path)])
    return dryrun.check(settings, ranks=ranks or settings.ranks or 1, opened=False)


def _row(path: Path, outcome: dryrun.Outcome) -> tuple[str, ...]:
    s = outcome.settings
    hours = f"{outcome.plan.gpu_hours:.3g}" if outcome.plan else "-"
    reads = f"{outcome.reads.bytes_per_s / 1e6:,.0f}" if outcome.reads else "-"
    cores = f"{outcome.reads.cores:,}" if outcome.reads and outcome.reads.cores else "-"
    rho = f"{s.rho:g}" if s.rule.ascent else "-"
    return (
        path.stem, f"{outcome.steps:,}", f"{s.warmup_steps:,}", f"{outcome.lr:.2g}", rho,
        s.precision, f"{outcome.passes:,}", str(outcome.ranks), hours, reads, cores,
    )  # fmt: skip


def _check(paths: Sequence[Path], ranks: int | None) -> int:
    lines, wrong = [], 0
    for path in paths:
        try:
            outcome = checked(path, ranks)
        except ConfigError as error:
            wrong += 1
            lines.append(f"wrong  {path.name}: {error}")
        else:
            effect = f"{outcome.steps:,} steps at lr {outcome.lr:.2g}, {outcome.passes:,} passes"
            lines.append(f"good   {path.name}: {effect}")
    print("\n".join([*lines, f"{len(paths)} recipes, {wrong} wrong"]))
    return 2 if wrong else 0


def main(argv: Sequence[str]) -> int:
    """List the recipes, or check them or other files. Exit code 2 if one is wrong."""
    parser = Parser(prog="dist-looksam recipes", description=__doc__)
    parser.add_argument("action", nargs="?", choices=("list", "check"), default="list")
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="YAML files or recipe:NAME; default: all recipes"
    )
    parser.add_argument("--ranks", type=int, help="ranks to check for; default: the file's")
    asked = parser.parse_intermixed_args(list(argv))  # for check --ranks 8 FILE
    if asked.ranks is not None and asked.ranks < 1:
        raise ConfigError(f"ranks must be >= 1, got {asked.ranks}.")
    paths = [project.file(name) for name in asked.files] or found()
    if asked.action == "check":
        return _check(paths, asked.ranks)
    rows = [_row(path, checked(path, asked.ranks)) for path in paths]
    known = len(_COLUMNS) - all(row[-1] == "-" for row in rows)  # the cores that decode
    lines = table.text(_COLUMNS[:known], [row[:known] for row in rows])
    print(  # in one piece, for `| head`
        f"{lines}\nGPU-hours on H200 at {SHARE:.0%} of the peak, and what a node must read, are "
        "planned, not measured: launch/recipes/README.md"
    )
    return 0
