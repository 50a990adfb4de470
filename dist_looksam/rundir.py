"""The run directory: made, kept apart from an older run, found again."""

import os
from pathlib import Path

from . import checkpoint
from .errors import ConfigError


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
