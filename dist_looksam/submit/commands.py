"""Check a run where that costs nothing, then start it: by SLURM, by a hostfile, or on this machine.

    dist-looksam submit --nodes 8 --gpus 8 --time 12:00:00 -- --config recipe.yaml
    dist-looksam submit --nodes 2 --gpus 8 --hostfile cluster/hostfile -- --optimizer look_sam
    dist-looksam submit --gpus 2 -- --data digits --device cpu       here; GPUs are then CPU ranks

What stands behind -- are flags of train.py. The checks: batch against ranks, data and their index,
the dry run, the partition, hostfile or machine, memory of its GPUs, and --out. The first that
fails is an error with exit code 2. The run is in `dist-looksam jobs` from its start on.
"""

import os
import shlex
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..cli import table
from ..cli.arguments import Parser
from ..errors import ConfigError
from ..plan import DEVICES, Machine, machine
from ..plan.machines import load
from ..settings import config
from ..settings.numbers import check_range
from .checks import NAMES, Preflight
from .ways import WAYS, Asked, chosen

# Of sbatch, which this command sets itself.
_OWN = (
    *("-N", "--nodes", "--ntasks-per-node", "--gpus-per-node", "-t", "--time", "-p", "--partition"),
    *("--parsable", "-a", "--array", "-W", "--wait"),
)


def _parser() -> Parser:
    parser = Parser(
        prog="dist-looksam submit",
        usage="%(prog)s [--nodes N] [--gpus G] [...] -- FLAGS OF train.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="N", help="number of nodes; default 1")
    text = "GPUs of a node, one rank each; with -- --device cpu ranks of a node; default 1"
    add("--gpus", type=int, default=1, metavar="G", help=text)
    add("--time", metavar="T", help="time limit of the SLURM job, like 30 (minutes) or 12:00:00")
    add("--partition", metavar="P", help="SLURM's partition, or several: a,b; default its own")
    add("--sbatch", default="", metavar="='OPTIONS'", help="more options of sbatch, in one word")
    add("--hostfile", type=Path, metavar="F", help="lines like `node1 slots=8`; reached by ssh")
    names = ("auto", *WAYS)
    text = f"{', '.join(names)}: with --hostfile that, else SLURM where sbatch is; default auto"
    add("--on", choices=names, default="auto", metavar="WAY", help=text)
    text = f"GPU that memory is planned for: {', '.join(DEVICES)}, or a file of `plan --calibrate`"
    known = "default what SLURM's GRES or this machine's driver names"
    add("--machine", metavar="M", help=f"{text}; {known}")
    text = f"checks to leave out, with commas between: {', '.join(NAMES)}; default none"
    add("--skip", default="", metavar="CHECKS", help=text)
    add("--print", action="store_true", help="check, and print the command; start nothing")
    return parser


def main(argv: Sequence[str]) -> int:
    """Check, print the command and start it. Exit code 2 where a check fails."""
    argv = list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    own, flags = _own_flags(argv[:at]), argv[at + 1 :]
    skip = _skipped(own.skip)
    asked = _asked(own)
    way = chosen(asked, own.on)
    settings = _settings(flags)
    out, flags = _out(settings, flags, way.name)
    preflight = Preflight(settings, asked, way, _machine(own.machine), out)
    rows = preflight.rows(skip)
    print(table.text(("check", "", ""), [[r.name, r.word, r.text] for r in rows], left=3))
    if errors := [row.error for row in rows if row.error]:
        raise ConfigError(errors[0])
    command = way.command(asked, flags, on_gpus=preflight.on_gpus)
    print(f"\n{command}", flush=True)
    if not own.print:
        print(way.start(command, out))
    return 0


def _own_flags(argv: Sequence[str]) -> Any:
    own, rest = _parser().parse_known_args(list(argv))
    if rest:
        raise ConfigError(
            f"flags of train.py must stand behind --, got {rest[0]} before it; see "
            f"dist-looksam submit --help."
        )
    check_range("nodes", own.nodes, 1, 100_000)
    check_range("gpus", own.gpus, 1, 1024)
    return own


def _asked(own: Any) -> Asked:
    try:
        options = shlex.split(own.sbatch)
    except ValueError as error:
        raise ConfigError(
            f"sbatch must hold options as in a shell, got {own.sbatch!r:.50} ({error})."
        ) from None
    for option in options:
        if option.split("=")[0] in _OWN:
            raise ConfigError(
                f"sbatch must hold options that submit has not, got {option}; see "
                f"dist-looksam submit --help."
            )
    return Asked(
        nodes=own.nodes,
        gpus=own.gpus,
        time=own.time,
        partition=own.partition,
        hostfile=own.hostfile,
        sbatch=options,
    )


def _skipped(text: str) -> set[str]:
    names = {name for name in text.split(",") if name}
    if unknown := sorted(names - {*NAMES}):
        raise ConfigError(f"skip must name checks: {', '.join(NAMES)}, got {unknown[0]}.")
    return names


def _settings(flags: Sequence[str]) -> config.Settings:
    settings = config.parse(flags)
    if settings.dry_run:
        raise ConfigError("submit makes the dry run by itself, got --dry_run; leave it out.")
    return settings


def _machine(name: str | None) -> Machine | None:
    if name is None:
        return None
    return load(Path(name)) if Path(name).is_file() else machine(name)


def _out(
    settings: config.Settings, flags: Sequence[str], way: str
) -> tuple[Path | None, list[str]]:
    """(the run directory, flags with it); None where slurm.sbatch names it by the job's number."""
    given = any(word.split("=")[0] == "--out" for word in flags)
    if given or settings.out != config.DEFAULTS["out"]:  # of a --config file
        return Path(settings.out), [*flags, *([] if given else ["--out", settings.out])]
    if way == "slurm":
        return None, list(flags)
    out = files.first_free(Path(os.environ.get("OUT") or "runs") / "submit-")
    return out, [*flags, "--out", str(out)]
