"""Published figures of others for a report: checked, and always marked second-hand."""

from pathlib import Path
from typing import Any

import yaml

from dist_looksam.errors import ConfigError
from dist_looksam.report.tables import NONE, Table

PAPER = Path(__file__).with_name("paper_figures.yaml")


def read(path: str | Path) -> Table:
    """A YAML file with title, source and figures as a separate table. Raises ConfigError."""
    try:
        text = yaml.safe_load(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"reference must be a YAML file, got {path} ({error.strerror})."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"reference must be YAML, got {' '.join(str(error).split())} in {path}."
        ) from None
    try:
        return Table(
            title=f"Second-hand: {text['title']}",
            caption=f"Source: {text['source']}.",
            head=["", "batch", "top-1 in %", "note"],
            rows=[_row(figure) for figure in text["figures"]],
        )
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"reference must hold title, source and figures, each with method, batch and top1 (a "
            f"fraction in [0, 1]), got {path} with {error!r}; see {PAPER.name}."
        ) from None


def _row(figure: dict[str, Any]) -> list[str]:
    top1 = float(figure["top1"])
    if not 0 <= top1 <= 1:
        raise ValueError(f"top1 {top1:g}")
    text = [str(figure["method"]), f"{int(figure['batch']):,}", f"{100 * top1:.1f}"]
    return [*text, str(figure.get("note") or NONE)]
