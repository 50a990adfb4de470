"""The run directory: made, kept apart from an older run, found again."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .. import checkpoint
from ..errors import ConfigError
from ..world import World, slurm_job
from .version import made_with

JOB = "job.json"
LOCK = ".lock"
LOG = "log.txt"
_PATIENCE = 5.0  # seconds that a run may need to die
_held: dict[Path, IO[str]] = {}


def prepare(out: Path, *, resume_step: int | None) -> list[str]:
    """Make `out`, and see that it can be written. Rank 0 only. Returns what the user is told.

    resume_step None: a fresh run. It finds an older one there: that is renamed to out.1, out.2,
    ..., never written over. Else later checkpoints, damaged or passed over, are renamed, for the
    run will come to their steps again. A lock is held on `out` until `release`.

    Raises:
        ConfigError: `out` cannot be written, or another process trains into it.
    """
    notes = []
    try:
        _refuse_a_live_run(out)
        if resume_step is None and (out / "config.yaml").exists():
            kept = next(p for n in range(1, 10**6) if not (p := Path(f"{out}.{n}")).exists())
            os.rename(out, kept)
            notes.append(f"an older run was in {out}; it is now {kept}")
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
        for path in checkpoint.found(out / "checkpoints"):
            if resume_step is not None and int(path.name.removeprefix("step-")) > resume_step:
                aside = f"{path}.passed-over"
                n = next(n for n in range(10**6) if not Path(f"{aside}-{n}").exists())
                os.rename(path, f"{aside}-{n}")
                notes.append(f"{path} is now {aside}-{n}")
        _held[out] = (out / LOCK).open("w")
        _locked(_held[out])
    except OSError as error:
        raise ConfigError(
            f"out must be a directory that can be written, got {out} ({error.strerror}); "
            f"name another with --out."
        ) from None
    return notes


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
            with suppress(OSError), (out / LOG).open("a", encoding="utf-8") as file:  # a full disk
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} error: {error}\n")
        raise


def _locked(file: IO[str]) -> bool:
    """Take the lock. False if another process has it; True, too, where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nobody can be told apart
        return True
    return True


def _refuse_a_live_run(out: Path) -> None:
    """ConfigError while another process trains into `out`; not for an earlier start of this job."""
    if not (out / LOCK).exists():
        return
    end = time.monotonic() + _PATIENCE
    with (out / LOCK).open() as file:
        while not _locked(file):
            who = job(out)
            if slurm_job() is not None and slurm_job() == who.get("slurm_job_id"):
                return
            if time.monotonic() > end:
                raise ConfigError(
                    f"out must not be in use, got {out}, into which process {who.get('pid')} on "
                    f"{who.get('host')} trains; end it (dist-looksam cancel {out}), or name "
                    f"another --out."
                )
            time.sleep(0.1)


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
        "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "output": os.environ.get("LOOKSAM_OUTPUT"),
        **made_with(),
        "starts": int(before.get("starts", 0)) + 1,
        "started": time.time(),
    }
    (out / "summary.json").unlink(missing_ok=True)
    scratch = out / f".{JOB}.new"
    scratch.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, out / JOB)


def job(out: Path) -> dict[str, Any]:
    """What job.json says; nothing where there is none."""
    try:
        return json.loads((out / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
