"""--track: sends the lines of metrics.jsonl to TensorBoard or Weights & Biases as well."""

import importlib.util
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError

TRACKERS = ("none", "tensorboard", "wandb")


class Tracker(Protocol):
    """Gets every line of metrics.jsonl after it is read from the device. Rank 0 only."""

    def write(self, row: dict[str, Any]) -> None:
        """Send one line. After a resume the earlier lines of the file come first."""
        ...

    def close(self) -> None:
        """Flush everything that was written."""
        ...


def check(kind: str) -> None:
    """ConfigError if the tracker's package is not installed."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise ConfigError(
            f"track {kind} needs the package {kind}, which is not installed; "
            f"install it (pip install {kind}) or leave --track out."
        )


def start(kind: str, out: Path, settings: dict[str, Any]) -> Tracker | None:
    """The tracker of a run directory; None for "none". ConfigError if it cannot be started."""
    if kind == "tensorboard":
        return TensorBoard(out)
    return WandB(out, settings) if kind == "wandb" else None


def _named(row: dict[str, Any]) -> dict[str, float]:
    """Values under names like train/loss; null is left out."""
    values = {k: v for k, v in row.items() if k != "step" and v is not None}
    return {
        "eval/" + k.removeprefix("eval_") if k.startswith("eval_") else f"train/{k}": float(v)
        for k, v in values.items()
    }


class TensorBoard:
    """Event files in OUT/tensorboard, rewritten from metrics.jsonl at every start, so that no step
    is shown twice after a resume."""

    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(out / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(str(out / "tensorboard"))

    def write(self, row: dict[str, Any]) -> None:
        """See `Tracker.write`."""
        for name, value in _named(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """See `Tracker.close`."""
        self._writer.close()


class WandB:
    """One run of Weights & Biases per run directory, continued after a resume.

    The user sets entity, project and mode: WANDB_ENTITY, WANDB_PROJECT, WANDB_MODE=offline.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        import wandb

        path = out / "wandb_id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dist_looksam"),
                dir=str(out),
                id=path.read_text(),
                name=out.name,
                resume="allow",
                config=settings,
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(
                f"track wandb could not be started: {' '.join(str(error).split())}; "
                f"wandb login, WANDB_MODE=offline, or leave --track out."
            ) from error

    def write(self, row: dict[str, Any]) -> None:
        """See `Tracker.write`. W&B ignores steps that it already has."""
        self._run.log(_named(row), step=row["step"])

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()
