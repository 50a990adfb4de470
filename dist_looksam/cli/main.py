"""The console script `dist-looksam`: one table of subcommands, each imported when it is called."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .. import __version__
from ..errors import ConfigError, did_you_mean
from .arguments import guarded
from .leave import leave


@dataclass(frozen=True, kw_only=True)
class Command:
    """One row. `module`.`function`(argv) -> exit code; it may raise ConfigError or RunError."""

    module: str
    function: str = "main"
    text: str


COMMANDS = {
    "train": Command(module="run.train", text="train a model; the same as train.py"),
    "recipes": Command(module="run.recipes", text="the recipes for ImageNet at 4k-64k; check"),
    "curves": Command(module="report.commands", function="draw_curves", text="draw curves.png"),
    "probe": Command(module="report.commands", function="draw_probe", text="draw the probed looks"),
    "report": Command(module="report.commands", function="draw_report", text="compare many runs"),
    "checkpoint": Command(module="checkpoint.commands", text="ls, verify, export, universal"),
    "bench": Command(module="measure.bench", text="time every optimizer against its base"),
    "sweep": Command(module="sweep.commands", text="run a grid of methods, batch sizes and seeds"),
    "cost": Command(module="measure.cost", text="count what a step sends and what a rank holds"),
    "plan": Command(module="plan.commands", text="what a run will hold, send and take"),
    "jobs": Command(
        module="record.jobs", function="show_jobs", text="runs of a folder, and SLURM's"
    ),
    "logs": Command(module="record.jobs", function="show_log", text="what a run printed"),
    "cancel": Command(module="record.jobs", function="cancel", text="stop a run and its SLURM job"),
    "world": Command(module="world.__main__", text="what each rank sees, and whether they can add"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {row.text}" for name, row in COMMANDS.items())
    return (
        "usage: dist-looksam COMMAND [ARGUMENTS]\n\n"
        "Large-batch distributed training of Vision Transformers with LookSAM.\n\n"
        f"commands:\n{rows}\n\n"
        "dist-looksam COMMAND --help lists what a command takes; --version prints the version."
    )


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, rest = argv[0], list(argv[1:])
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, "see dist-looksam --help.")
        raise ConfigError(f"command must be one of {', '.join(COMMANDS)}, got {name!r}; {hint}")
    row = COMMANDS[name]
    module = importlib.import_module(f"..{row.module}", __package__)
    return getattr(module, row.function)(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Exit code: 0 done, 1 it failed, 2 the arguments are wrong.

    Without `argv` it is the program itself: it takes sys.argv and does not return.
    """
    if argv is None:
        leave(guarded(_dispatch, sys.argv[1:]))
    return guarded(_dispatch, argv)


if __name__ == "__main__":
    main()
