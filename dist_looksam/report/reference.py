"""Figures of others that may stand beside a report: checked, and always marked second-hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_looksam.errors import ConfigError
from dist_looksam.report.tables import NONE, Table, Text

PAPER = Path(__file__).with_name("paper_figures.yaml")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One accuracy that somebody else reported."""

    method: str
    batch: int
    top1: float
    note: str


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A file of such figures, and where they come from."""

    title: str
    source: str
    figures: Sequence[Figure]

    def table(self) -> Table:
        """As a table of its own, never mixed with what was run."""
        rows = [
            [
                Text(text=text)
                for text in (f.method, f"{f.batch:,}", f"{100 * f.top1:.1f}", f.note or NONE)
            ]
            for f in self.figures
        ]
        return Table(
            title=f"Second-hand: {self.title}",
            caption=f"Source: {self.source}.",
            head=["", "batch", "top-1 in %", "note"],
            rows=rows,
        )


def read(path: str | Path) -> Reference:
    """A YAML file with title, source and figures. Raises ConfigError, in one sentence."""
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
        figures = [_figure(row) for row in text["figures"]]
        return Reference(title=str(text["title"]), source=str(text["source"]), figures=figures)
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"reference must hold title, source and figures, each with method, batch and top1 (a "
            f"fraction in [0, 1]), got {path} with {error!r}; see {PAPER.name}."
        ) from None


def _figure(row: dict[str, Any]) -> Figure:
    top1 = float(row["top1"])
    if not 0 <= top1 <= 1:
        raise ValueError(f"top1 {top1:g}")
    return Figure(
        method=str(row["method"]), batch=int(row["batch"]), top1=top1, note=str(row.get("note", ""))
    )
