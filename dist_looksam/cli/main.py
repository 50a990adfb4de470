"""The console script `dist-looksam`: a table of commands, each imported when it is called."""

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
    "recipes": Command(
        module="run.recipes", text="list or check the recipes for ImageNet at batch sizes 4k-64k"
    ),
    "curves": Command(
        module="report.commands", function="draw_curves", text="draw curves.png of a run"
    ),
    "probe": Command(
        module="report.commands",
        function="draw_probe",
        text="draw probe.jsonl of a run: norms and changes of g_s, g_h, g_v",
    ),
    "report": Command(
        module="report.commands",
        function="draw_report",
        text="compare many runs in tables and charts",
    ),
    "checkpoint": Command(
        module="checkpoint.commands", text="list, verify, export or convert checkpoints"
    ),
    "bench": Command(
        module="measure.bench", text="measure the step time of optimizers against their bases"
    ),
    "sweep": Command(
        module="sweep.commands", text="run every method, batch size and seed of a file"
    ),
    "cost": Command(
        module="measure.cost", text="measure the communication of a step and the memory of a rank"
    ),
    "plan": Command(
        module="plan.commands", text="estimate memory, communication and time of a run"
    ),
    "jobs": Command(
        module="record.jobs",
        function="show_jobs",
        text="list the runs of a folder and the jobs of SLURM",
    ),
    "logs": Command(
        module="record.jobs", function="show_log", text="print the last lines of a run's output"
    ),
    "cancel": Command(module="record.jobs", function="cancel", text="stop a run and its SLURM job"),
    "world": Command(
        module="world.__main__", text="check what each rank detects, and that ranks can all-reduce"
    ),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {row.text}" for name, row in COMMANDS.items())
    return (
        "usage: dist-looksam COMMAND [ARGUMENTS]\n\n"
        "Large-batch distributed training of Vision Transformers with LookSAM.\n\n"
        f"commands:\n{rows}\n\n"
        "dist-looksam COMMAND --help lists its arguments; --version prints the version."
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
    """Run a command. Returns the exit code: 0 done, 1 failed, 2 wrong arguments, 130 Ctrl-C.

    Without `argv` it takes sys.argv and ends the process.
    """
    if argv is None:
        leave(guarded(_dispatch, sys.argv[1:]))
    return guarded(_dispatch, argv)


if __name__ == "__main__":
    main()
