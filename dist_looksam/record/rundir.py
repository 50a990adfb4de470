"""The run directory: made, kept apart from an older run, found again."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .. import checkpoint, files
from ..errors import ConfigError
from ..world import World, slurm_job
from .version import made_with

CONFIG = "config.yaml"
SUMMARY = "summary.json"
JOB = "job.json"
SUBMITTED = "submitted.json"  # launch/slurm.sbatch writes it before it starts the ranks
PLACED = (SUBMITTED, "point.json")  # put into a run directory before the run
WEIGHTS = "model.safetensors"
_LEFT = (CONFIG, SUMMARY, WEIGHTS, "metrics.jsonl", "probe.jsonl")  # what a run writes anew
LOCK = ".lock"
LOG = "log.txt"
_PATIENCE = 5.0  # seconds that a run may need to die
_held: dict[Path, IO[str]] = {}


def prepare(out: Path, *, resume_step: int | None, resumed: Path | None = None) -> list[str]:
    """Make `out`, and see that it can be written. Rank 0 only. Returns what the user is told.

    resume_step None: a fresh run, as is one that goes on from a checkpoint `resumed` outside of
    `out`. It finds an older run there, or other files of the same names: `out` is renamed to out.1,
    out.2, ..., never written over, but for what an earlier start of the same SLURM job left: that
    is the same run, and has no checkpoint. Else later checkpoints, damaged or passed over, are
    renamed, for the run will come to their steps again. A lock is held on `out` until `release`.

    Raises:
        ConfigError: `out` cannot be written, or another process trains into it.
    """
    notes = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = holder(out)
        held = _take(out)
        saved = checkpoint.found(out / "checkpoints")
        elsewhere = resumed is not None and out.resolve() not in resumed.resolve().parents
        again = _earlier_start(before) and (elsewhere or not saved)
        if (resume_step is None or elsewhere) and used(out) and not again:
            real = out.resolve() if out.is_symlink() else out  # the link stays where it is
            kept = files.first_free(f"{real}.", start=1)
            os.rename(real, kept)
            real.mkdir()
            for name in PLACED:
                if (kept / name).exists():
                    os.rename(kept / name, out / name)
            held.close()
            held = _take(out)
            notes.append(f"an older run was in {out}; it is now {kept}")
        _held[out] = held
        (out / "checkpoints").mkdir(exist_ok=True)
        probe = out / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
        for path in checkpoint.found(out / "checkpoints"):
            if resume_step is not None and int(path.name.removeprefix("step-")) > resume_step:
                aside = files.first_free(f"{path}.passed-over-")
                os.rename(path, aside)
                notes.append(f"{path} is now {aside}")
    except OSError as error:
        raise ConfigError(
            f"out must be a directory that can be written, got {out} ({error.strerror}); "
            f"name another with --out."
        ) from None
    return notes


def used(out: Path) -> bool:
    """Whether a run's files are in `out`, or others of the same names."""
    return bool(checkpoint.found(out / "checkpoints")) or any((out / x).exists() for x in _LEFT)


def _earlier_start(who: dict[str, Any]) -> bool:
    """Whether `who` held the lock for this SLURM job before it was requeued."""
    mine = slurm_job() is not None and slurm_job() == who.get("slurm_job_id")
    return mine and who.get("slurm_restarts", 0) < _restarts()


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def release(out: Path) -> None:
    """Let other runs into `out`; so does the end of the process, however it comes."""
    if out in _held:
        _held.pop(out).close()


@contextmanager
def told(out: Path, rank: int) -> Iterator[None]:
    """Inside, what ends the run is in its log, too. Wrong settings are not: the log may be that of
    another run, which is why they are wrong."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if rank == 0 and (out / LOG).exists():
            log = (out / LOG).open("a", encoding="utf-8", errors="backslashreplace")
            with suppress(OSError), log as file:  # a full disk
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} error: {error}\n")
        raise


# Whether a process trains into a directory is asked of its lock, never of process numbers: those
# are used again.


def _take(out: Path) -> IO[str]:
    """The lock file of `out`, locked, with this process's name in it.

    Not locked, but given back: where the file system has no locks, and where an earlier start of
    the same SLURM job, on a lost node, still holds it. ConfigError if another process trains here.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        file = (out / LOCK).open("a+")
        if files.lock(file) is not False:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(out / LOCK)):
                break  # else another start has renamed the directory in between
        elif _earlier_start(who := holder(out)):
            return file
        elif time.monotonic() > end:
            raise ConfigError(
                f"out must not be in use, got {out}, into which process {who.get('pid')} on "
                f"{who.get('host')} trains; end it (dist-looksam cancel {out}), or name "
                f"another --out."
            )
        file.close()
        time.sleep(0.1)
    file.truncate(0)
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "slurm_job_id": slurm_job(),
        "slurm_restarts": _restarts(),
    }
    file.write(json.dumps(mine) + "\n")
    file.flush()
    return file


def _began(pid: int) -> str | None:
    """When a process of this host began, in ticks since the host did; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def holder(out: Path) -> dict[str, Any]:
    """The process that trains into `out`, or the last that did: host, pid, began; {} if unknown."""
    return _object(out / LOCK)


def _object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; {} where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def alive(out: Path) -> bool | None:
    """Whether a process trains into `out`. None: it was on another host, and this one cannot tell,
    since a lock need not reach from host to host."""
    try:
        with (out / LOCK).open() as file:
            free = files.lock(file, shared=True)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    if free is False:
        return True
    here = (holder(out) or job(out)).get("host") == socket.gethostname()
    return False if free and here else None


def stop(out: Path) -> int | None:
    """SIGTERM to the process of this host that trains into `out`: its number; None if it is gone.

    A process that has got its number since is not signalled.
    """
    who = holder(out)
    if not alive(out) or who.get("host") != socket.gethostname():
        return None
    began, pid = who.get("began"), who.get("pid")
    if began is None or not isinstance(pid, int) or _began(pid) != began:
        return None
    os.kill(pid, signal.SIGTERM)
    return pid


def to_resume(out: Path, resume: str) -> list[Path]:
    """The checkpoints that --resume means, the first to be taken if it is whole; [] for none."""
    if resume == "none":
        return []
    if resume != "auto":
        path = Path(resume)
        if not (path / checkpoint.MANIFEST).is_file():
            raise ConfigError(
                f"resume must be auto, none or a complete checkpoint, got {resume}; "
                f"name a directory like RUN/checkpoints/step-100."
            )
        return [path]
    return checkpoint.found(out / "checkpoints")


def record(out: Path, world: World, hosts: list[str]) -> None:
    """Write job.json: who runs this, where, since when, and how often it was started. Rank 0 only.

    The summary of an earlier start goes: a run has one when it is done.
    """
    before = job(out)
    now = {
        "launcher": world.launcher,
        "ranks": world.size,
        "hosts": list(dict.fromkeys(hosts)),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job_id": slurm_job(),
        "slurm_restarts": _restarts(),
        "output": os.environ.get("LOOKSAM_OUTPUT"),
        **made_with(),
        "starts": int(before.get("starts", 0)) + 1,
        "started": time.time(),
    }
    (out / SUMMARY).unlink(missing_ok=True)
    files.replace_text(out / JOB, json.dumps(now, indent=1) + "\n")
    (out / SUBMITTED).unlink(missing_ok=True)  # job.json says it all


def job(out: Path) -> dict[str, Any]:
    """What job.json says, and of a SLURM job that has not begun to train what its script wrote;
    nothing where there is neither."""
    return _object(out / JOB) | _object(out / SUBMITTED)
