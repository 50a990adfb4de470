"""The run directory: its files, the lock on it, and the process that trains into it."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from .. import checkpoint, files
from ..errors import ConfigError
from ..world import World, slurm_job
from . import processes
from .machine import machine
from .version import made_with

CONFIG = "config.yaml"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
PROBE = "probe.jsonl"
JOB = "job.json"
SUBMITTED = "submitted.json"  # of slurm.sbatch and `dist-looksam submit`, until the run begins
POINT = "point.json"  # of a sweep
PLACED = (SUBMITTED, POINT)  # written into a run directory before the run
WEIGHTS = "model.safetensors"
WEIGHTS_EMA = "model_ema.safetensors"
FLATNESS = "flatness.json"  # of `dist-looksam flatness`, about the weights
_WRITTEN = (CONFIG, SUMMARY, WEIGHTS, WEIGHTS_EMA, METRICS, PROBE)  # by a run
LOCK = ".lock"
LOG = "log.txt"
_PATIENCE = 5.0  # seconds that a run may need to die
_locks: dict[Path, IO[str]] = {}  # held by this process


def prepare(out: Path, *, resume_step: int | None, resumed: Path | None = None) -> list[str]:
    """Make `out`, check that it can be written, lock it until `release`. Rank 0 only.

    Returns notes for the user. With resume_step None a fresh run starts; so does one that goes on
    from a checkpoint `resumed` outside of `out`. An older run in `out`, or other files of the same
    names, are then renamed to out.1, out.2, ..., unless they are of an earlier start of the same
    SLURM job without a checkpoint, which is the same run. Otherwise checkpoints of later steps are
    renamed, because the run will reach these steps again.

    Raises:
        ConfigError: `out` cannot be written, or another process trains into it.
    """
    notes = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = holder(out)
        lock = _take(out)
        saved = checkpoint.found(out / "checkpoints")
        elsewhere = resumed is not None and out.resolve() not in resumed.resolve().parents
        again = _earlier_start(before) and (elsewhere or not saved)
        if (resume_step is None or elsewhere) and used(out) and not again:
            real = out.resolve() if out.is_symlink() else out  # the link stays where it is
            older = files.first_free(f"{real}.", start=1)
            os.rename(real, older)
            real.mkdir()
            for name in PLACED:
                if (older / name).exists():
                    os.rename(older / name, out / name)
            lock.close()
            lock = _take(out)
            notes.append(f"an older run was in {out}; it is now {older}")
        _locks[out] = lock
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


def check_place(out: Path) -> None:
    """ConfigError for a directory among the checkpoints of a run, which counts and deletes them."""
    for folder in (out.absolute(), *out.absolute().parents):
        inside = folder.name == "checkpoints" and (folder.parent / CONFIG).exists()
        if inside or (folder / checkpoint.MANIFEST).exists():
            raise ConfigError(
                f"out must not be among the checkpoints of a run, got {out}, inside of {folder}; "
                f"name another --out."
            )


def used(out: Path) -> bool:
    """Whether a run's files are in `out`, or others of the same names."""
    saved = checkpoint.found(out / "checkpoints")
    return bool(saved) or any((out / name).exists() for name in _WRITTEN)


def _earlier_start(process: dict[str, Any]) -> bool:
    """Whether `process` held the lock for this SLURM job before it was requeued."""
    same = slurm_job() is not None and slurm_job() == process.get("slurm_job_id")
    return same and process.get("slurm_restarts", 0) < _restarts()


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def release(out: Path) -> None:
    """Unlock `out`; so does any end of the process."""
    if out in _locks:
        _locks.pop(out).close()


@contextmanager
def log_failure(out: Path, rank: int) -> Iterator[None]:
    """Append the exception that ends the run to log.txt, on rank 0.

    A ConfigError is not appended: `out` may be in use, and the log that of another run.
    """
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


# The lock says whether a process trains into a directory. A process number does not: it is reused.


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
        elif _earlier_start(process := holder(out)):
            return file
        elif time.monotonic() > end:
            raise ConfigError(
                f"out must not be in use, got {out}, into which process {process.get('pid')} on "
                f"{process.get('host')} trains; end it (dist-looksam cancel {out}), or name "
                f"another --out."
            )
        file.close()
        time.sleep(0.1)
    file.truncate(0)
    process = {
        **processes.named(os.getpid()),
        "slurm_job_id": slurm_job(),
        "slurm_restarts": _restarts(),
    }
    file.write(json.dumps(process) + "\n")
    file.flush()
    return file


def holder(out: Path) -> dict[str, Any]:
    """{host, pid, began, ...} of the process that trains into `out`, or the last that did; {} if
    unknown."""
    return files.json_object(out / LOCK) or {}


def alive(out: Path) -> bool | None:
    """Whether a process trains into `out`. None if it was on another host, whose locks may not be
    visible here."""
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
    """SIGTERM to the process of this host that trains into `out`.

    Returns its number; None if it has ended. A later process with the same number is not signalled.
    """
    return processes.terminate(holder(out)) if alive(out) else None


def to_resume(out: Path, resume: str) -> list[Path]:
    """The checkpoints that --resume allows, in the order in which they are tried; [] for none."""
    if resume == "none":
        return []
    own = checkpoint.found(out / "checkpoints")
    # A requeued SLURM job gets its flags again: it has gone on from the path of --resume before.
    if resume != "auto" and not (own and _earlier_start(job(out))):
        path = Path(resume)
        saved = [path] if (path / checkpoint.MANIFEST).is_file() else []
        if not (saved := saved or checkpoint.found(path / "checkpoints")):
            raise ConfigError(
                f"resume must be auto, none or a complete checkpoint, or a run that has one, got "
                f"{resume}; name a directory like RUN or RUN/checkpoints/step-100."
            )
        return saved
    return own


def record(out: Path, world: World, hosts: list[str], device: torch.device) -> None:
    """Write job.json: launcher, ranks, hosts, device of this rank, process, time and number of
    starts. Rank 0 only.

    Removes what is known of an earlier start's last weights: summary and flatness.
    """
    before = job(out)
    start = files.json_object(out / SUBMITTED) or {}
    started_by = start.get("started_by") or {}
    if processes.alive(started_by) is False:  # of an earlier start, which died
        start, started_by = {}, {}
    now = {
        "launcher": world.launcher,
        "ranks": world.size,
        "hosts": list(dict.fromkeys(hosts)),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job_id": None if started_by else slurm_job(),  # not of its own: an allocation
        "slurm_restarts": _restarts(),
        "output": os.environ.get("LOOKSAM_OUTPUT") or start.get("output"),
        "started_by": started_by,
        **made_with(),
        **machine(device),
        "starts": int(before.get("starts", 0)) + 1,
        "started": time.time(),
    }
    for name in (SUMMARY, FLATNESS):
        (out / name).unlink(missing_ok=True)
    files.replace_json(out / JOB, now)
    (out / SUBMITTED).unlink(missing_ok=True)  # job.json holds the same


def job(out: Path) -> dict[str, Any]:
    """The content of job.json, and of submitted.json where a start has not begun to train."""
    return (files.json_object(out / JOB) or {}) | (files.json_object(out / SUBMITTED) or {})
