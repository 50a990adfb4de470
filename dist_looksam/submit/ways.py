"""The ways to start a run: a SLURM job, the machines of a hostfile, or this machine.

Each starts a script of launch/, in a wheel the packaged copy, with the Python of this process.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import files, project
from ..errors import ConfigError
from ..record import jobs, processes, rundir
from . import partitions

OUTPUT = "output.txt"  # of a launcher that is not SLURM's, in the run directory
_LAUNCH = project.FOLDER / "launch"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for. gpus: of a node, one rank each. `time` is of SLURM's form."""

    nodes: int
    gpus: int
    time: str | None = None
    partition: str | None = None
    hostfile: Path | None = None
    sbatch: Sequence[str] = ()

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line: `words`, with `env` added to the environment."""

    words: list[str]
    env: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        env = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*env, shlex.join(self.words)])


def _variables() -> dict[str, str]:
    """What the scripts of launch/ take from the environment. Named in the printed command, so that
    it starts the same run in another shell."""
    names = ("SITE", "CONTAINER", "PYTHON")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    # A container has a Python of its own.
    return given if "CONTAINER" in given else {"PYTHON": sys.executable, **given}


class _Elsewhere:
    """Machines that are not seen from here: they have GPUs."""

    def on_gpus(self, device: str) -> bool:
        """Whether ranks with this --device train on GPUs."""
        return device != "cpu"


class Slurm(_Elsewhere):
    """A job of launch/slurm.sbatch. Without an --out of the user's, the job's number names it."""

    name = "slurm"

    def launcher(self, asked: Asked) -> str:
        return "slurm" if asked.ranks > 1 else "single"  # as `World` takes them

    def check(self, asked: Asked, *, on_gpus: bool) -> tuple[str, list[str]]:
        """A line for the table, and the types of the GPUs, where known. ConfigError where the
        partition cannot run it."""
        return partitions.check(
            nodes=asked.nodes,
            gpus=asked.gpus if on_gpus else 0,
            time=asked.time,
            name=asked.partition or os.environ.get("SBATCH_PARTITION"),
        )

    def command(self, asked: Asked, flags: Sequence[str], *, on_gpus: bool) -> Command:
        words = ["sbatch", "--parsable", f"--nodes={asked.nodes}"]
        words.append(f"--ntasks-per-node={asked.gpus}")
        words += [f"--gpus-per-node={asked.gpus}"] if on_gpus else []
        words += [f"--time={asked.time}"] if asked.time else []
        words += [f"--partition={asked.partition}"] if asked.partition else []
        words += [*asked.sbatch, str(_LAUNCH / "slurm.sbatch"), *flags]
        return Command(words=words, env=_variables())

    def start(self, command: Command, out: Path | None) -> str:
        """Submit; returns a line for the user. The run directory names the job from here on."""
        number = jobs.sbatch(command.words, **command.env)
        out = out or Path(os.environ.get("OUT") or "runs") / f"slurm-{number}"
        known = jobs.slurm_job(number)
        output = known.output if known and known.output else f"slurm-{number}.out"
        line = f"SLURM job {number} will train into {out}; {_see(out)}"
        if rundir.job(out).get("slurm_job_id") == number:  # it has begun already
            return line
        return line + _note(out, {"slurm_job_id": number, "output": str(Path(output).absolute())})


class _Detached:
    """A launcher that outlives this process. Its output is in the run directory."""

    def start(self, command: Command, out: Path | None) -> str:
        """Start it; returns a line for the user."""
        assert out is not None
        out.mkdir(parents=True, exist_ok=True)
        output = (out / OUTPUT).absolute()
        with output.open("a" if rundir.used(out) else "w") as file:  # not a dead start's
            process = subprocess.Popen(
                command.words,
                env={**os.environ, **command.env, "LOOKSAM_OUTPUT": str(output)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # not ended with the terminal
            )
        started_by = processes.named(process.pid)
        content = {"slurm_job_id": None, "output": str(output), "started_by": started_by}
        return f"process {process.pid} starts a run in {out}; {_see(out)}{_note(out, content)}"


class Hosts(_Elsewhere, _Detached):
    """The first machines of a hostfile, over ssh: by DeepSpeed's launcher, or by mpirun."""

    name = "hostfile"

    def launcher(self, asked: Asked) -> str:
        return "deepspeed" if self._script() == "deepspeed.sh" else "openmpi"

    def _script(self) -> str:
        mpirun = os.environ.get("MPIRUN", "mpirun")
        # DeepSpeed's launcher has no way for these.
        if name := next((n for n in ("SITE", "CONTAINER") if os.environ.get(n)), None):
            if not shutil.which(mpirun):
                raise ConfigError(
                    f"{name} with a hostfile needs {mpirun}, got none here; install it, unset "
                    f"{name}, or call launch/torchrun.sh on every machine."
                )
            return "mpi.sh"
        if shutil.which("pdsh") and importlib.util.find_spec("deepspeed"):
            return "deepspeed.sh"
        if not shutil.which(mpirun):
            raise ConfigError(
                f"a hostfile needs pdsh and DeepSpeed, or {mpirun}, got neither here; install one, "
                f"or call launch/torchrun.sh on every machine."
            )
        return "mpi.sh"

    def check(self, asked: Asked, *, on_gpus: bool) -> tuple[str, list[str]]:
        """As of `Slurm`. ConfigError for fewer machines, or with other slots, than asked."""
        assert asked.hostfile is not None
        machines = _machines(asked.hostfile, self._script())
        if len(machines) < asked.nodes:
            raise ConfigError(
                f"nodes must be <= the {len(machines)} machines of {asked.hostfile}, got "
                f"{asked.nodes}; add machines, or use --nodes {len(machines)}."
            )
        for host, slots in machines[: asked.nodes]:
            if slots != asked.gpus:
                raise ConfigError(
                    f"gpus must be the slots of every machine, got {asked.gpus} and {host} with "
                    f"slots={slots} in {asked.hostfile}; correct one of them."
                )
        line = f"{asked.hostfile}: {asked.nodes} of {len(machines)} machines, {self._script()}"
        return line, []

    def command(self, asked: Asked, flags: Sequence[str], *, on_gpus: bool) -> Command:
        script = self._script()
        many = {"NODES": asked.nodes} if script == "deepspeed.sh" else {"RANKS": asked.ranks}
        env = {"HOSTFILE": str(asked.hostfile), **{k: str(n) for k, n in many.items()}}
        return Command(words=["bash", str(_LAUNCH / script), *flags], env={**env, **_variables()})


def _machines(path: Path, script: str) -> list[tuple[str, int]]:
    """(name, slots) of every machine; the script that is started checks the form of the lines."""
    try:
        lines = [line.partition("#")[0].split() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a text"
        raise ConfigError(
            f"hostfile must be a file like cluster/hostfile.example, got {path} ({why})."
        ) from None
    found = []
    for host, *words in filter(None, lines):
        slots = [re.fullmatch(r"slots=([1-9]\d*)", word) for word in words]
        if script == "deepspeed.sh" and not (slots and slots[0]):
            raise ConfigError(
                f"DeepSpeed needs slots=N behind each machine's name, got "
                f"{' '.join([host, *words])!r:.50} in {path}; add it."
            )
        found.append((host, next((int(m[1]) for m in slots if m), 1)))
    return found


class Here(_Detached):
    """This machine, by torchrun."""

    name = "here"

    def launcher(self, asked: Asked) -> str:
        return "torchrun"

    def on_gpus(self, device: str) -> bool:
        """Whether ranks with this --device train on GPUs."""
        return device == "cuda" or (device == "auto" and torch.cuda.is_available())

    def check(self, asked: Asked, *, on_gpus: bool) -> tuple[str, list[str]]:
        """As of `Slurm`. ConfigError for several nodes, or more ranks than GPUs."""
        if asked.nodes > 1:
            raise ConfigError(
                f"several nodes need sbatch on the path, or --hostfile FILE, got {asked.nodes} "
                f"nodes and neither; name a hostfile, or use --nodes 1."
            )
        if on_gpus and asked.gpus > (count := torch.cuda.device_count()):
            instead = f"--gpus {count}" if count else "-- --device cpu"
            raise ConfigError(
                f"gpus must be <= the {count} of this machine, got {asked.gpus}; use {instead}."
            )
        cards = {torch.cuda.get_device_name(i) for i in range(asked.gpus)} if on_gpus else set()
        return f"this machine, {asked.gpus} ranks on {'GPUs' if on_gpus else 'CPUs'}", sorted(cards)

    def command(self, asked: Asked, flags: Sequence[str], *, on_gpus: bool) -> Command:
        env = {"RANKS": str(asked.gpus), **_variables()}
        return Command(words=["bash", str(_LAUNCH / "torchrun.sh"), *flags], env=env)


Way = Slurm | Hosts | Here
WAYS: dict[str, Way] = {way.name: way for way in (Slurm(), Hosts(), Here())}


def chosen(asked: Asked, on: str) -> Way:
    """The way of that name; for auto, by what was given and what is here.

    Raises ConfigError for flags of another way.
    """
    if on == "auto":
        on = "hostfile" if asked.hostfile else "slurm" if shutil.which("sbatch") else "here"
    only = {"hostfile": ("hostfile",), "slurm": ("time", "partition", "sbatch")}
    for owner, names in only.items():
        for name in names:
            if getattr(asked, name) and on != owner:
                raise ConfigError(f"{name} is of --on {owner}, got --on {on}; leave out --{name}.")
    if on == "hostfile" and not asked.hostfile:
        raise ConfigError("hostfile must be given with --on hostfile, got none; use --hostfile F.")
    if on == "slurm" and not shutil.which("sbatch"):
        raise ConfigError(
            "--on slurm needs sbatch on the path, got none here; call it on a login node."
        )
    return WAYS[on]


def _note(out: Path, content: dict[str, Any]) -> str:
    """Note in the run directory what was started; "", or a sentence where it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.replace_json(out / rundir.SUBMITTED, content)
    except OSError as error:
        return f"; jobs does not show it before it trains: {out} was not written ({error.strerror})"
    return ""


def _see(out: Path) -> str:
    name = shlex.quote(str(out))
    return f"see `dist-looksam logs {name}`, end it with `dist-looksam cancel {name}`"
