"""Statistics of a set of runs: means per method and batch, differences, costs, batch ranges.

A *cell* is one label at one batch, each seed once. Two cells are compared seed by seed, because
runs of one seed share their first weights and the order of their samples: the mean of the
differences, with its 95 % interval by Student's t (which takes them as normally distributed).
One shared seed, or equal differences, give no interval.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from dist_looksam.optim.table import METHODS
from dist_looksam.report.runs import SUPERSEDED, UNFINISHED, Run, RunSet
from dist_looksam.report.statistic import Difference, MeanSd, many
from dist_looksam.settings.alike import WITHOUT_EFFECT

# Runs that differ in the seed alone take equally long on a machine without other load; with other
# load they differed by up to a factor of 10.
_QUIET = 1.25


@dataclass(frozen=True, kw_only=True)
class Label:
    """One line of the report: its method, and the lines that it is compared with."""

    name: str
    method: str
    base: str
    k: int | None = None  # of methods that look every k-th step
    base_label: str | None = None  # the line of its base alone; itself where it is one
    sam_label: str | None = None  # the line that looks at every step, for methods with a k


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The finished final runs of one label at one batch, each seed once."""

    runs: tuple[Run, ...]

    @property
    def top1(self) -> MeanSd:
        """Accuracy, a fraction."""
        return MeanSd(tuple(self.by_seed.values()))

    @property
    def by_seed(self) -> dict[int, float]:
        """Accuracy of each seed."""
        return {run.seed: run.top1 for run in self.runs if run.top1 is not None}

    def minus(self, other: "Cell") -> Difference:
        """Accuracy minus that of `other`, seed by seed."""
        own, others = self.by_seed, other.by_seed
        shared = [own[seed] - others[seed] for seed in own.keys() & others.keys()]
        if not shared:
            return Difference(self.top1.mean - other.top1.mean, None, None, 0)
        return Difference.of(shared)

    @property
    def troubled(self) -> bool:
        """Whether one of its runs diverged or skipped many steps."""
        return any(run.trouble for run in self.runs)

    def numbers(self, name: str, *, per_step: bool = False) -> MeanSd | None:
        """A number of the runs; None where no run has it."""
        values = tuple(per_seed(self.runs, name, per_step=per_step).values())
        return MeanSd(values) if values else None


def per_seed(runs: Sequence[Run], name: str, *, per_step: bool = True) -> dict[int, float]:
    """A number of the runs by seed, without runs that do not have it."""
    known = {run.seed: (getattr(run, name), run.steps or 1) for run in runs}
    return {s: x / n if per_step else x for s, (x, n) in known.items() if x is not None}


@dataclass(frozen=True, kw_only=True)
class BatchRange:
    """The batch sizes at which one label stays within `points` % of its own best mean."""

    best_at: int
    best: MeanSd
    up_to: int  # the largest batch before a fall
    falls_at: int | None = None
    fall: Difference | None = None  # that mean minus the best; None: no run there has an accuracy
    missing: tuple[int, ...] = ()  # batches before up_to at which no run of it has finished


@dataclass(kw_only=True)
class Study:
    """Everything that tables and charts are made from."""

    labels: list[Label]
    batches: list[int]
    cells: dict[tuple[str, int], Cell]
    finals: list[Run]  # finished final runs, also those that means leave out
    lost: set[tuple[str, int]]  # cells with a finished run that has no accuracy at all
    unfinished: list[Run]
    quiet: bool  # whether times can be compared: runs that differ in the seed alone took as long
    notes: list[str] = field(default_factory=list)

    @property
    def tried(self) -> list[int]:
        """Batches of all final runs, also of those that do not count, rising."""
        lost = {batch for _, batch in self.lost}
        return sorted({*self.batches, *lost, *(r.batch for r in self.unfinished if r.final)})

    def of(self, label: str | None, batch: int) -> Cell | None:
        """The cell, or None."""
        return self.cells.get((label, batch)) if label else None

    def along(self, label: str) -> list[tuple[int, Cell]]:
        """(batch, cell) of one label, batches rising."""
        return [(b, self.cells[label, b]) for b in self.batches if (label, b) in self.cells]

    def differences(self, label: str, other: str) -> dict[int, Difference]:
        """Accuracy of `label` minus that of `other`, by batch, where both were run."""
        both = [b for b in self.batches if {(label, b), (other, b)} <= self.cells.keys()]
        return {b: self.cells[label, b].minus(self.cells[other, b]) for b in both}

    def over_batches(self, label: str, other: str) -> Difference | None:
        """The mean of these differences over the batches, of seeds that both have at each batch."""
        batches = self.differences(label, other)
        cells = [(self.cells[label, b].by_seed, self.cells[other, b].by_seed) for b in batches]
        seeds = set.intersection(*(x.keys() & y.keys() for x, y in cells)) if cells else ()
        each = [statistics.fmean(x[s] - y[s] for x, y in cells) for s in seeds]
        return Difference.of(each) if each else None

    def cost(self, label: Label, batch: int, name: str) -> MeanSd | None:
        """`name` per step over that of the base, by seed, from runs on as many ranks.

        Where they share no seed it is the ratio of their means.
        """
        own, base = self.of(label.name, batch), self.of(label.base_label, batch)
        if not own or not base:
            return None
        shared = {r.world_size for r in own.runs} & {r.world_size for r in base.runs}
        for ranks in sorted(shared, key=lambda n: n or 0):
            over, under = (
                per_seed([r for r in cell.runs if r.world_size == ranks], name)
                for cell in (own, base)
            )
            if over and under and min(under.values()) > 0:
                means = statistics.fmean(over.values()) / statistics.fmean(under.values())
                seeds = sorted(over.keys() & under.keys())
                return MeanSd(tuple(over[s] / under[s] for s in seeds) or (means,))
        return None

    def best(self, batch: int) -> list[str]:
        """Labels at `batch`, the highest mean first."""
        here = [x.name for x in self.labels if (x.name, batch) in self.cells]
        return sorted(here, key=lambda name: -self.cells[name, batch].top1.mean)

    def leader(self, batch: int) -> str | None:
        """The best label, where the interval of its lead over the second excludes 0.

        None where one of its runs was lost: the mean of the others is too good.
        """
        order = self.best(batch)
        if len(order) < 2 or (order[0], batch) in self.lost:
            return None
        lead = self.cells[order[0], batch].minus(self.cells[order[1], batch])
        return order[0] if lead.clear and lead.mean > 0 else None  # over shared seeds: may be < 0

    def batch_range(self, label: str, points: float) -> BatchRange | None:
        """From its best batch upwards, until the mean is more than `points` % below the best.

        A batch at which all its runs ended without an accuracy is a fall; a batch of others
        at which it has no finished run is `missing`.
        """
        line = self.along(label)
        if not line:
            return None
        best_at, best = max(line, key=lambda row: row[1].top1.mean)
        up_to, missing = best_at, []
        falls_at, fall = None, None
        for batch in (b for b in self.tried if b > best_at):
            cell = self.of(label, batch)
            if cell is None and (label, batch) not in self.lost:
                missing.append(batch)
                continue
            fall = cell.minus(best) if cell else None
            if cell is None or 100 * (best.top1.mean - cell.top1.mean) > points:
                falls_at = batch
                break
            up_to = batch
        return BatchRange(
            best_at=best_at,
            best=best.top1,
            up_to=up_to,
            falls_at=falls_at,
            fall=fall if falls_at is not None else None,
            missing=tuple(b for b in missing if b < up_to),
        )


def study(run_set: RunSet) -> Study:
    """Group the runs; `notes` are sentences that a reader must know."""
    notes = list(run_set.notes)
    finals = _of_one_kind([run for run in run_set.runs if run.final], notes)
    cells = _cells([run for run in finals if run.counts], notes)
    labels = _labels([run for cell in cells.values() for run in cell.runs])
    unfinished = [r for r in run_set.runs if r.state == UNFINISHED and r.stage != SUPERSEDED]
    if dropped := sum(run.stage == SUPERSEDED for run in run_set.runs):
        notes.append(f"Left out: {many(dropped, 'run')} of settings that the sweep has dropped.")
    if unfinished:
        which = ", ".join(_named(run) for run in unfinished[:6])
        more = f" and {len(unfinished) - 6} more" if len(unfinished) > 6 else ""
        one = len(unfinished) == 1
        notes.append(
            f"{many(len(unfinished), 'run')} of {len(run_set.runs)} "
            f"{'is' if one else 'are'} not finished and {'does' if one else 'do'} not count: "
            f"{which}{more}."
        )
    notes += _troubles(finals) + _unlike(labels, cells) + _mixed(cells)
    slowest = _slowest([run for run in finals if run.counts])
    if slowest > _QUIET:
        notes.append(
            f"Times are left out, for they were not measured on a quiet machine: of two runs that "
            f"differ in their seed alone one took {slowest:.1f} times as long. report.csv has the "
            f"seconds of every run."
        )
    made = Study(
        labels=labels,
        batches=sorted({batch for _, batch in cells}),
        cells=cells,
        finals=[run for run in finals if run.counts],
        lost={(r.label, r.batch) for r in finals if r.state != UNFINISHED and r.top1 is None},
        unfinished=unfinished,
        quiet=slowest <= _QUIET,
        notes=notes,
    )
    if made.quiet and (swift := _faster_than_base(made)):
        made.quiet = False
        notes.append(
            f"Times are left out, for they were not measured on a quiet machine: {swift} of the "
            f"time of its base with more passes. report.csv has the seconds of every run."
        )
    return made


def _faster_than_base(made: Study) -> str | None:
    """The first method with more passes than its base, and less time than a machine explains."""
    for label in made.labels:
        for batch in made.batches if label.base_label != label.name else ():
            passes, seconds = (made.cost(label, batch, name) for name in ("passes", "seconds"))
            if passes and seconds and passes.mean > 1 and seconds.mean < 1 / _QUIET:
                return f"{label.name} took {seconds.mean:.2f}"
    return None


def _of_one_kind(finals: list[Run], notes: list[str]) -> list[Run]:
    """Without runs evaluated on held-out training images, if others were on the test images.

    The two accuracies are of different images.
    """
    held = [run for run in finals if run.holdout]
    if not held:
        return finals
    if any(run.counts and not run.holdout for run in finals):
        one = len(held) == 1
        notes.append(
            f"Left out: {many(len(held), 'final run')} evaluated on held-out "
            f"training images, where others saw the test images: "
            f"{_named(held[0])}{'' if one else f' and {len(held) - 1} more'}."
        )
        return [run for run in finals if not run.holdout]
    sizes = " or ".join(f"{n:,}" for n in sorted({run.holdout for run in held}))
    notes.append(f"Accuracy is of {sizes} held-out training images, not of the test images.")
    return finals


def _named(run: Run) -> str:
    return f"{run.label}, batch {run.batch:,}, seed {run.seed}"


def _cells(runs: list[Run], notes: list[str]) -> dict[tuple[str, int], Cell]:
    """Each (label, batch, seed) counts once for accuracy: fewest ranks, then the latest start."""
    once: dict[tuple[str, int, int], list[Run]] = {}
    for run in runs:
        once.setdefault((run.label, run.batch, run.seed), []).append(run)
    cells: dict[tuple[str, int], list[Run]] = {}
    for (label, batch, _), same in sorted(once.items()):
        same.sort(key=lambda run: (run.world_size or 0, -run.started, run.folder))
        cells.setdefault((label, batch), []).append(same[0])
        twins = [run.folder for run in same[1:] if run.world_size == same[0].world_size]
        if twins:
            notes.append(
                f"{_named(same[0])} was run {len(twins) + 1} times; the latest counts, "
                f"{same[0].folder}, and not {', '.join(twins)}."
            )
    return {at: Cell(runs=tuple(runs)) for at, runs in cells.items()}


def _labels(runs: list[Run]) -> list[Label]:
    order = list(METHODS)
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.label, run)
    names = sorted(first, key=lambda name: (order.index(first[name].method), name))

    def line(method: str | None, base: str) -> str | None:
        same = [n for n in names if first[n].method == method and first[n].base == base]
        return method if method in same else same[0] if len(same) == 1 else None

    labels = []
    for name in names:
        run = first[name]
        row = METHODS[run.method]
        sams = [m for m, r in METHODS.items() if r.ascent == row.ascent and not r.settable_k]
        is_base = run.method == run.base
        labels.append(
            Label(
                name=name,
                method=run.method,
                base=run.base,
                k=run.setting("k") if row.settable_k else None,
                base_label=name if is_base else line(run.base, run.base),
                sam_label=line(sams[0], run.base) if row.settable_k and sams else None,
            )
        )
    return labels


def _slowest(runs: list[Run]) -> float:
    """The largest ratio of seconds a step of two runs that differ in their seed alone."""
    alike: dict[tuple[str, int, int | None, str | None], list[float]] = {}
    for run in runs:
        if run.seconds and run.steps and not run.trouble:
            at = run.label, run.batch, run.world_size, run.host
            alike.setdefault(at, []).append(run.seconds / run.steps)
    return max((max(seconds) / min(seconds) for seconds in alike.values()), default=1.0)


def _troubles(finals: list[Run]) -> list[str]:
    notes = []
    for run in finals:
        if run.trouble and run.top1 is None:
            notes.append(f"{_named(run)} {run.trouble} and does not count in any mean.")
        elif run.trouble:
            notes.append(f"{_named(run)} counts, but {run.trouble}.")
    return notes


def _unlike(labels: list[Label], cells: dict[tuple[str, int], Cell]) -> list[str]:
    """Settings that make a comparison unfair or a mean meaningless where they differ."""
    runs = [run for cell in cells.values() for run in cell.runs]
    notes = []
    for name in ("data", "model", "precision", "augment", "train_images", "holdout"):
        values = sorted({str(run.config.get(name)) for run in runs})
        if len(values) > 1:
            notes.append(f"The runs differ in {name}: {', '.join(values)}.")
    for batch in sorted({batch for _, batch in cells}):
        steps: dict[int | None, list[str]] = {}
        for label in labels:
            cell = cells.get((label.name, batch))
            for count in {run.steps for run in cell.runs} if cell else ():
                steps.setdefault(count, []).append(label.name)
        if len(steps) > 1:
            counts = "; ".join(f"{', '.join(who)}: {n:,}" for n, who in steps.items() if n)
            notes.append(
                f"At batch {batch:,} the methods took different numbers of steps: {counts}."
            )
    hosts = sorted({run.host for run in runs if run.host})
    if len(hosts) > 1:
        notes.append(
            f"The runs were timed on {len(hosts)} machines: compare seconds only where they are "
            f"alike."
        )
    return notes


def _mixed(cells: dict[tuple[str, int], Cell]) -> list[str]:
    """Cells whose runs differ in more than the seed: their spread is not that of seeds."""
    notes = []
    for (label, batch), cell in cells.items():
        names = sorted({name for run in cell.runs for name in run.config} - WITHOUT_EFFECT)
        parts = []
        for name in names:
            seeds: dict[str, list[int]] = {}
            for run in cell.runs:
                seeds.setdefault(_as_text(run.setting(name)), []).append(run.seed)
            if len(seeds) > 1:
                each = [f"{v} (seed {', '.join(map(str, who))})" for v, who in seeds.items()]
                parts.append(f"{name} {' and '.join(each)}")
        if parts:
            notes.append(
                f"{label}, batch {batch:,}: mean and spread are over runs of different settings: "
                f"{'; '.join(parts)}."
            )
    return notes


def _as_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "not set" if value is None else str(value)
