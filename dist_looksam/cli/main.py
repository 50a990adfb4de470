"""The console script `dist-looksam`: a table of commands, each imported when it is called."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .. import __version__
from ..errors import ConfigError, did_you_mean
from .arguments import guarded
from .leave import leave


@dataclass(frozen=True)
class Command:
    """One row. `module`.`function`(argv) -> exit code; it may raise ConfigError or RunError."""

    module: str
    text: str
    function: str = "main"


COMMANDS = {
    "train": Command("run.train", "train a model; the same as train.py"),
    "submit": Command("submit.commands", "check a run, then start it: SLURM, hostfile, or here"),
    "init": Command("run.init", "write launch scripts, a hostfile and a recipe to start from"),
    "recipes": Command("run.recipes", "list or check the recipes for ImageNet at batches 4k-64k"),
    "curves": Command("report.commands", "draw the curves of a run, or of several", "draw_curves"),
    "probe": Command("report.commands", "draw probe.jsonl of a run", "draw_probe"),
    "report": Command("report.commands", "compare many runs in tables and charts", "draw_report"),
    "watch": Command("watch.commands", "follow runs on a page while they train"),
    "data": Command("data.commands", "pack images into tar shards, index, check, stage them"),
    "checkpoint": Command("checkpoint.commands", "list, verify, export or convert checkpoints"),
    "bench": Command("measure.bench", "measure the step time of optimizers against their bases"),
    "sweep": Command("sweep.commands", "run every method, batch size and seed of a file"),
    "cost": Command("measure.cost", "measure a step's communication and a rank's memory"),
    "eval": Command("measure.evaluation", "score trained weights: top1, top5, loss, calibration"),
    "predict": Command("measure.prediction", "print the classes of pictures with probabilities"),
    "flatness": Command("measure.flatness", "measure how flat the minima of trained runs are"),
    "plan": Command("plan.commands", "estimate memory, communication and time of a run"),
    "jobs": Command("record.jobs", "list the runs of a folder and the jobs of SLURM", "show_jobs"),
    "logs": Command("record.jobs", "print the last lines of a run's output", "show_log"),
    "cancel": Command("record.jobs", "stop a run or its SLURM job", "cancel"),
    "world": Command("world.__main__", "check that the ranks find one another and all-reduce"),
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
