"""The run directory: made, kept apart from an older run, found again."""

import os
from pathlib import Path

from . import checkpoint
from .errors import ConfigError


def prepare(out: Path, *, fresh: bool) -> str | None:
    """Make `out`, and see that it can be written. Rank 0 only.

    A fresh run finds an older one there: that is renamed to out.1, out.2, ..., never written over.
    Returns the sentence that says so, if so.
    """
    note = None
    try:
        if fresh and (out / "config.yaml").exists():
            kept = next(p for n in range(1, 10**6) if not (p := Path(f"{out}.{n}")).exists())
            os.rename(out, kept)
            note = f"an older run was in {out}; it is now {kept}"
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = out / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"out must be a directory that can be written, got {out} ({error.strerror}); "
            f"name another with --out."
        ) from None
    return note


def to_resume(out: Path, resume: str) -> Path | None:
    """The checkpoint that --resume means; None to start from scratch."""
    if resume == "none":
        return None
    if resume != "auto":
        path = Path(resume)
        if not (path / checkpoint.MANIFEST).is_file():
            raise ConfigError(
                f"resume must be auto, none or a complete checkpoint, got {resume}; "
                f"name a directory like RUN/checkpoints/step-100."
            )
        return path
    newest = checkpoint.found(out / "checkpoints")
    return newest[0] if newest else None
