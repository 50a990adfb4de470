"""What a finished run leaves in its directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoint, files
from ..errors import ConfigError, RunError
from ..record import rundir


def write(
    out: Path,
    summary: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor] | None],
    about: Mapping[str, str],
) -> str:
    """Write weights with their metadata, curves.png and, last, summary.json. Returns a note.

    Args:
        out: the run directory. weights: by file name. about: metadata of the weights.
    """
    for name, tensors in weights.items():
        assert tensors is not None
        _write_weights(tensors, out / name, about)
    note = _draw(out)
    files.replace_json(out / rundir.SUMMARY, {**summary})
    return note


def _draw(out: Path) -> str:
    """Draw curves.png; returns a note. The drawing packages are an extra of this package."""
    try:
        from ..report import curves  # not loaded on every rank

        return f"curves: {curves(out)}"
    except ConfigError as error:
        return f"curves.png was not drawn: {error}"


def _write_weights(weights: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    try:
        checkpoint.write_tensors(path, weights, about)
    except OSError as error:
        raise RunError(
            f"{path} was not written: {error}; the newest checkpoint is whole, `dist-looksam "
            f"checkpoint export` makes the same file of it."
        ) from error
