"""The tried and chosen settings: number of trials of each method, choices at a grid's edge."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dist_looksam.report.runs import TUNE, Choice, Run, RunSet


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The trials of one label at one batch, and the chosen one."""

    label: str
    batch: int
    trials: tuple[Run, ...]
    choice: Choice | None

    @property
    def scored(self) -> list[Run]:
        """Trials that ended with an accuracy."""
        return [run for run in self.trials if run.top1 is not None]

    @property
    def tried(self) -> dict[str, list[float]]:
        """Values of every setting that was tried, rising."""
        names = sorted({name for run in self.trials for name in run.tuned})
        sets = {n: {r.tuned[n] for r in self.trials if n in r.tuned} for n in names}
        return {name: sorted(values) for name, values in sets.items() if _numbers(values)}

    @property
    def chosen(self) -> Mapping[str, Any]:
        """The settings in choices.json; {} without one."""
        return self.choice.flags if self.choice else {}

    @property
    def edges(self) -> dict[str, str]:
        """Settings whose chosen value is the smallest or the largest of at least two tried."""
        edges = {}
        for name, values in self.tried.items():
            value = self.chosen.get(name)
            if len(values) > 1 and value in (values[0], values[-1]):
                edges[name] = "smallest" if value == values[0] else "largest"
        return edges

    def took(self, run: Run) -> bool:
        """Whether `run` is the trial that was chosen."""
        return bool(self.chosen) and all(run.tuned.get(n) == v for n, v in self.chosen.items())


def _numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def tunings(run_set: RunSet, order: list[str]) -> list[Tuning]:
    """Every (label, batch) that was tuned or has a choice, labels in `order`, batches rising."""
    groups: dict[tuple[str, int], list[Run]] = {at: [] for at in run_set.choices}
    for run in run_set.runs:
        if run.stage == TUNE:
            groups.setdefault((run.label, run.batch), []).append(run)
    rank = {label: i for i, label in enumerate(order)}
    return [
        Tuning(label=at[0], batch=at[1], trials=tuple(runs), choice=run_set.choices.get(at))
        for at, runs in sorted(
            groups.items(), key=lambda item: (rank.get(item[0][0], len(rank)), item[0])
        )
    ]


def warnings(tuned: list[Tuning]) -> list[str]:
    """A sentence for each difference in budgets, and for each choice at the edge of its grid."""
    notes = []
    budgets: dict[int, dict[int, list[str]]] = {}
    for t in tuned:
        count = len(t.trials) or (t.choice.trials if t.choice else None) or 0
        budgets.setdefault(t.batch, {}).setdefault(count, []).append(t.label)
    for batch, counts in sorted(budgets.items()):
        if len(counts) > 1:
            each = "; ".join(f"{', '.join(who)}: {n}" for n, who in sorted(counts.items()))
            notes.append(f"At batch {batch:,} the methods had different budgets of trials: {each}.")
    for label in dict.fromkeys(t.label for t in tuned):
        notes += _edge_notes([t for t in tuned if t.label == label])
    return notes


def _edge_notes(tuned: list[Tuning]) -> list[str]:
    """Notes on choices of one label at an edge of their grid; of two values, both are edges."""
    notes: list[str] = []
    pairs: dict[tuple[str, float, float], list[int]] = {}
    ends: dict[tuple[str, str, float], list[int]] = {}
    for t in tuned:
        for name, side in t.edges.items():
            if len(t.tried[name]) == 2:
                low, high = t.tried[name]
                pairs.setdefault((name, low, high), []).append(t.batch)
            else:
                ends.setdefault((name, side, t.chosen[name]), []).append(t.batch)

    def where(batches: list[int]) -> str:
        if len(batches) == len(tuned) > 1:
            return f"{tuned[0].label}, every tuned batch"
        return f"{tuned[0].label}, batch {', '.join(f'{batch:,}' for batch in batches)}"

    for (name, low, high), batches in pairs.items():
        notes.append(
            f"{where(batches)}: only two values of {name} were tried, {low:g} and {high:g}, so "
            f"every choice is at the edge of its grid."
        )
    for (name, side, value), batches in ends.items():
        notes.append(
            f"{where(batches)}: the chosen {name} {value:g} is the {side} that was tried; the best "
            f"may lie beyond."
        )
    return notes
