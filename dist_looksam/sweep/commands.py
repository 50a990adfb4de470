"""Run every method, batch size and seed that a YAML file asks for, here or as a SLURM job array.

    dist-looksam sweep launch/sweeps/fashion_mnist.yaml --jobs 2
    dist-looksam sweep FILE.yaml --devices 0,1,2,3 --jobs 4      one GPU each
    dist-looksam sweep FILE.yaml --slurm -- --nodes 2 --time 60  as a job array; sbatch's options

A point is one run. The same command again runs the points that are not done yet.
"""

import shutil
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from .. import files
from ..cli.arguments import Parser
from ..errors import ConfigError, RunError
from ..record.progress import h_mm_ss
from ..settings.numbers import check_range
from . import array, grid, local
from .grid import Point
from .ledger import Ledger


def main(argv: Sequence[str]) -> int:
    """Run a sweep to its end, or send it to SLURM. Exit code 1 where points failed."""
    argv = list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    flags = _parser().parse_args(argv[:at])
    if argv[at + 1 :] and not flags.slurm:
        raise ConfigError("what stands behind -- is for sbatch; add --slurm or leave it out.")
    for name, least, most in (("jobs", 1, 1024), ("ranks", 1, 1024), ("at_once", 0, 10**6)):
        check_range(name, getattr(flags, name), least, most)
    devices = [d for d in flags.devices.split(",") if d]
    if devices and len(devices) < flags.jobs * flags.ranks:
        raise ConfigError(
            f"devices must name one GPU for each rank of each job, {flags.jobs} x {flags.ranks}, "
            f"got {len(devices)}; name more, or use fewer jobs."
        )
    sweep = grid.read(flags.file)
    out = (flags.out or Path("runs") / flags.file.stem).absolute()
    ledger = Ledger(sweep, out, flags.keep and flags.keep.absolute())
    for name, folder in (("out", ledger.out), ("keep", ledger.keep)):
        try:
            if folder is not None and (there := files.unwritable(folder)):
                raise OSError(0, f"{there} cannot")
            if folder is not None and not flags.dry_run:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{name} must be a folder that can be written, got {folder} ({error.strerror}); "
                f"name another."
            ) from None
    if flags.dry_run:
        return _list(ledger)
    if flags.file.resolve() != (out / "sweep.yaml").resolve():
        shutil.copyfile(flags.file, out / "sweep.yaml")
    with _alone(out):
        ledger.save_choices()
        ledger.keep_copies()
        if flags.slurm:
            again = [str(out / "sweep.yaml"), "--out", str(out), "--slurm"]
            again += ["--keep", str(ledger.keep)] if ledger.keep else []
            again += ["--at_once", str(flags.at_once), "--", *argv[at + 1 :]]
            options = argv[at + 1 :]
            report = array.submit(ledger, again=again, at_once=flags.at_once, options=options)
            print(report, ledger.table(), sep="\n\n")
            return 0
        return _run(ledger, local.LocalSlots(jobs=flags.jobs, ranks=flags.ranks, devices=devices))


def _parser() -> Parser:
    raw = RawDescriptionHelpFormatter
    parser = Parser(prog="dist-looksam sweep", description=__doc__, formatter_class=raw)
    parser.add_argument("file", type=Path, help="YAML file; examples are in launch/sweeps/")
    add = parser.add_argument
    add("--out", type=Path, help="folder of the sweep; default runs/ and the file's name")
    add("--keep", type=Path, help="folder for a few kilobytes of each finished point, as for git")
    add("--jobs", type=int, default=1, help="points at once on this machine; default 1")
    add("--ranks", type=int, default=1, help="ranks of each point on this machine; default 1")
    add("--devices", default="", help="GPUs, one for each rank of each job, like 0,1,2,3")
    add("--slurm", action="store_true", help="submit the points as a SLURM job array")
    add("--at_once", type=int, default=0, help="array elements at once; default 0: all")
    add("--dry_run", action="store_true", help="list the points; run nothing")
    return parser


def _alone(out: Path) -> IO[str]:
    """A lock on the folder, held until it is closed or this process ends."""
    file = (out / ".lock").open("w")
    if files.lock(file) is False:
        file.close()
        raise ConfigError(
            f"out must not be in use, got {out}, in which another sweep works; name another."
        )
    return file


def _list(ledger: Ledger) -> int:
    due, done = ledger.due()
    for point in due:
        print(point.name, " ".join(point.argv()))
    unknown = ledger.total - len(due) - len(done)
    waits = f", {unknown} are known once their trials are done" if unknown else ""
    print(f"{ledger.total} points: {len(done)} are done, {len(due)} can run now{waits}")
    return 0


class ProgressPrinter:
    """Prints a line for each ended point: its result, and the time that the others will take."""

    def __init__(self, ledger: Ledger, jobs: int) -> None:
        self.ledger, self.jobs = ledger, jobs
        self.spent = self.work = 0.0

    def note(self, text: str) -> None:
        print(text, flush=True)

    def ended(self, point: Point, seconds: float, code: int) -> None:
        summary = self.ledger.summary(point)
        self.ledger.save_choices()
        self.ledger.keep_copies()
        done = len(self.ledger.due()[1])
        self.spent += seconds
        self.work += point.weight
        result = f"top1 {summary['top1']:.2%}" if summary else f"FAILED (exit {code})"
        if summary and code:
            result += f" (exit {code}, see {self.ledger.log(point)})"
        tuned = "".join(f" {k}={v:g}" for k, v in point.tuned.items())
        total = self.ledger.total
        left = self.spent / self.work * self._left() / self.jobs
        self.note(
            f"[{done}/{total}] {point.name}{tuned if point.stage == 'final' else ''}: {result}, "
            f"{seconds:.0f} s, ETA {h_mm_ss(left)}"
        )

    def _left(self) -> float:
        """Weight of the points that are not done; those not yet known count as average."""
        due, done = self.ledger.due()
        known = [p.weight for p in due + done]
        unknown = self.ledger.total - len(known)
        return sum(p.weight for p in due) + unknown * sum(known) / len(known)


def _run(ledger: Ledger, slots: local.LocalSlots) -> int:
    due, done = ledger.due()
    print(f"{ledger.total} points, {len(done)} done before; {ledger.out}", flush=True)
    printer, began = ProgressPrinter(ledger, slots.jobs), time.monotonic()
    try:
        failed = local.LocalSweep(ledger, slots, printer.note, printer.ended).run()
    except local.Stopped:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(ledger.table(), end="")
    ledger.keep_copies()
    print(f"{len(due) and time.monotonic() - began:.0f} s; {ledger.out / 'table.md'}")
    if failed:
        names = ", ".join(p.name for p in failed[:3])
        raise RunError(
            f"{len(failed)} points failed: {names}; see {ledger.log(failed[0])}, then call again."
        )
    return 0
