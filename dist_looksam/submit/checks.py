"""What can be known to fail before a run waits in a queue, as rows of a table."""

import os
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from .. import files
from ..data.extent import Extent, is_there
from ..data.sets import data_set
from ..errors import ConfigError, RunError
from ..plan import DEVICES, Machine, device_of, machine, plan
from ..plan.run import check as check_covered
from ..record import jobs, rundir, trackers
from ..run import dryrun, pretrained, resume
from ..settings import assemble
from ..settings.config import Settings
from .ways import Asked, Way

NAMES = ("batch", "data", "settings", "nodes", "memory", "out")
_NEEDS = {"settings": {"batch", "data"}, "memory": {"batch", "data", "settings", "nodes"}}
_BUSY = ("starting", "running", "waiting", "requeued", "preempted", "completing")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One check. `error`: why it failed; None where it did not. made: False if it was left out."""

    name: str
    text: str
    error: str | None = None
    made: bool = True

    @property
    def word(self) -> str:
        if self.error:
            return "FAILED"
        return "good" if self.made else "not made"


class _NotMade(Exception):
    """A check that cannot be made, with the line for the table."""


class Preflight:
    """The checks of a run with these settings, not resolved. `out` is None where SLURM names it.

    machine: memory is planned for it; None: for the GPUs that the check `nodes` finds.
    """

    def __init__(
        self, settings: Settings, asked: Asked, way: Way, machine: Machine | None, out: Path | None
    ) -> None:
        self.settings, self.asked, self.way, self.machine = settings, asked, way, machine
        self.out = out
        self.launcher = way.launcher(asked)
        self.extent: Extent | None = None
        self.outcome: dryrun.Outcome | None = None
        self.cards: list[str] = []  # types of the GPUs, as SLURM or the driver names them

    @property
    def on_gpus(self) -> bool:
        return self.way.on_gpus(self.settings.device)

    def rows(self, skip: Collection[str]) -> list[Row]:
        """Every check but those of `skip`; a check whose needs have failed is not made."""
        found: list[Row] = []
        for name in NAMES:
            failed = {row.name for row in found if row.error}
            if name in skip or failed & _NEEDS.get(name, set()):
                found.append(Row(name=name, text="", made=False))
            else:
                found.append(_row(name, getattr(self, f"_{name}")))
        return found

    def _batch(self) -> str:
        s = self.settings.for_ranks(ranks=self.asked.ranks, launcher=self.launcher)
        assemble.check(s)
        assert s.micro_batch is not None
        rounds = s.batch_size // (s.micro_batch * self.asked.ranks)
        return f"{s.batch_size:,} = {s.micro_batch} x {self.asked.ranks:,} ranks x {rounds}"

    def _data(self) -> str:
        place = self.settings.data_dir
        if place and data_set(self.settings.data).stands_for and not is_there(place):
            raise ConfigError(
                f"data_dir must be here as on the nodes, got {place}, which is not; correct it, or "
                f"use --skip data where only the nodes have it."
            )
        self.extent = assemble.extent_of(self.settings, opened=True)
        return f"{self.extent.said}: {self.extent.samples:,} images"

    def _settings(self) -> str:
        """The dry run, which reads the weights of --init unless the data are only on the nodes; and
        libraries that this Python lacks, which the nodes run, too."""
        self.outcome = dryrun.check(
            self.settings,
            ranks=self.asked.ranks,
            launcher=self.launcher,
            opened=self.extent is not None,
            data=self.extent,
        )
        s, init = self.outcome.settings, self.outcome.init
        if init and pretrained.absent(s.init or ""):
            raise ConfigError(
                f"init must be here as on the nodes, got {s.init}, which is not; correct it, or "
                f"use --skip data where only the nodes have it."
            )
        if not {"SITE", "PYTHON", "CONTAINER"} & {*os.environ}:
            trackers.check(s.track)
            if missing := s.backend_row.lacking(s):
                raise ConfigError(missing)
        text = f"{s.optimizer}, {self.outcome.model}, {s.backend}, {self.outcome.steps:,} steps"
        return "; ".join([text, *init])

    def _memory(self) -> str:
        outcome = self.outcome
        if not self.on_gpus or outcome is None:
            raise _NotMade("not planned on CPUs" if not self.on_gpus else "not planned")
        try:
            check_covered(outcome.settings)
        except ConfigError as error:
            raise _NotMade(f"not planned: {error}") from None
        planned = plan(
            replace(self.settings, micro_batch=outcome.settings.micro_batch),
            gpus=self.asked.ranks,
            machine=self._planned_for(),
            gpus_per_node=self.asked.gpus,
            samples=outcome.data.samples,
            classes=outcome.data.classes,
            launcher=self.launcher,
        )
        device = planned.machine.device
        room = f" of {device.memory / 1e9:.0f} GB" if device.memory else ""
        named = f"; the nodes have {', '.join(filter(None, self.cards))}" if any(self.cards) else ""
        return f"{planned.memory.peak / 1e9:.2g} GB a rank{room}, {device.name}{named}"

    def _planned_for(self) -> Machine:
        """That of --machine, else of the GPUs with the least memory of those that ranks may get."""
        if self.machine is not None:
            return self.machine
        devices = [device_of(card) for card in self.cards]
        known = [device for device in devices if device is not None]
        if known and len(known) == len(devices):
            return machine(min(known, key=lambda device: device.memory or 0.0))
        got = ", ".join(card or "no type" for card in self.cards)
        why = f"GPUs are named {got}" if got else "the type of GPUs is not known"
        raise _NotMade(f"not planned: {why}; name the GPU: --machine {'|'.join(DEVICES)}|FILE")

    def _out(self) -> str:
        if self.out is None:
            _check_writable(Path(os.environ.get("OUT") or "runs"))
            return "a new one, named by the job's number"
        rundir.check_place(self.out)
        _check_writable(self.out)
        if rundir.used(self.out) or (self.out / rundir.SUBMITTED).exists():
            state = jobs.row_of(self.out)["state"]
            if state in _BUSY:
                raise ConfigError(
                    f"out must not be in use, got {self.out}, whose run is {state}; end it with "
                    f"dist-looksam cancel {self.out}, or name another --out."
                )
        if rundir.used(self.out) and self.settings.resume == "none":
            raise ConfigError(
                f"out must be free, got {self.out} with an older run; continue it with --resume "
                f"auto, or name another --out."
            )
        if self.outcome is None:
            return str(self.out)
        planned = replace(self.outcome.settings, out=str(self.out))
        return resume.outlook(planned, self.outcome.data)[0]

    def _nodes(self) -> str:
        line, self.cards = self.way.check(self.asked, on_gpus=self.on_gpus)
        return line


def _check_writable(out: Path) -> None:
    if there := files.unwritable(out):
        raise ConfigError(
            f"out must be a directory that can be written, got {out}, where {there} cannot; name "
            f"another with --out."
        )
    try:
        with tempfile.TemporaryFile(dir=files.nearest(out), buffering=0) as file:
            file.write(bytes(2**16))
    except OSError as error:
        raise ConfigError(
            f"out must have room, got {out}, where nothing can be written ({error.strerror}); make "
            f"room, or name another with --out."
        ) from None


def _row(name: str, check: Callable[[], str]) -> Row:
    try:
        return Row(name=name, text=check())
    except _NotMade as why:
        return Row(name=name, text=str(why), made=False)
    except (ConfigError, RunError) as error:
        return Row(name=name, text=str(error), error=str(error))
