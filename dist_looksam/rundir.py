"""The run directory: made, kept apart from an older run, found again."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import ConfigError
from .world import World

JOB = "job.json"


def prepare(out: Path, *, resume_step: int | None) -> list[str]:
    """Make `out`, and see that it can be written. Rank 0 only. Returns what the user is told.

    resume_step None: a fresh run. It finds an older one there: that is renamed to out.1, out.2,
    ..., never written over. Else later checkpoints, damaged or passed over, are renamed, for the
    run will come to their steps again.
    """
    notes = []
    try:
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
    except OSError as error:
        raise ConfigError(
            f"out must be a directory that can be written, got {out} ({error.strerror}); "
            f"name another with --out."
        ) from None
    return notes


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
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "output": os.environ.get("LOOKSAM_OUTPUT"),
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
