"""The answer in words: who holds accuracy how far, what k costs, what it keeps against SAM.

Every number is computed from the runs, and a difference smaller than its spread is called that.
"""

import statistics
from collections.abc import Sequence

from dist_looksam.report.kept import kept
from dist_looksam.report.study import FEWEST, Amount, Hold, Label, Study
from dist_looksam.report.tables import amount, ratio

MINUS = "\N{MINUS SIGN}"


def answer(study: Study, points: float) -> str:
    """One paragraph. `points`: how many % below its own best mean counts as a fall."""
    sentences = [_holds(study, points), _falls(study, points), _passed_over(study, points)]
    sentences.append(_at_the_end(study))
    for label in study.labels:
        if label.k is not None:
            sentences += [_costs(study, label), _keeps(study, label), _gains(study, label)]
    if all(cell.top1.n == 1 for cell in study.cells.values()):
        sentences.append("Every point is a single seed, so no difference here has a known spread.")
    return " ".join(text for text in sentences if text)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _spread(value: Amount) -> str:
    """How a difference compares with its spread."""
    if not value.sd:
        return "spread unknown"
    if not value.judged:
        return f"{value.n} seeds, too few to judge"
    return "more than the spread" if value.clear else "within spread"


def _holds(study: Study, points: float) -> str:
    """Who holds furthest, among methods that were run at more than one batch."""
    several = [label.name for label in study.labels if len(study.along(label.name)) > 1]
    holds = {name: hold for name in several if (hold := study.hold(name, points))}
    if not holds:
        return "No method was run at more than one batch, so nothing is known of larger ones."
    furthest = max(hold.up_to for hold in holds.values())
    who = [name for name, hold in holds.items() if hold.up_to == furthest]
    names = f"All {len(who)} methods" if len(who) == len(study.labels) > 2 else _listed(who)
    keeps, own = ("keeps", "its") if len(who) == 1 else ("keep", "their")
    end = ", the largest batch tried" if furthest == study.tried[-1] else ""
    return (
        f"{names} {keeps} within {points:g} point{'s' * (points != 1)} of {own} own best mean up "
        f"to batch {furthest:,}{end}{_ahead(study, holds, furthest)}."
    )


def _ahead(study: Study, holds: dict[str, Hold], furthest: int) -> str:
    """Of which others that can be said: those that fell. Who was not run so far lost to nobody."""
    fell = [n for n, hold in holds.items() if hold.up_to < furthest and hold.falls_at is not None]
    ends = {label.name: study.along(label.name)[-1][0] for label in study.labels}
    short = [n for n, end in ends.items() if n not in fell and end < furthest]
    told = f", further than {_listed(fell)}" if fell else ""
    if fell and not short and len(study.labels) > 2:
        told = ", further than any other"
    if short:
        rows = [f"{name} (to {ends[name]:,})" for name in short]
        told += f"; {_listed(rows)} {'was' if len(rows) == 1 else 'were'} not run that far"
    return told


def _falls(study: Study, points: float) -> str:
    """Where each method first is more than `points` below its own best mean."""
    told = []
    for label in study.labels:
        hold = study.hold(label.name, points)
        if hold and hold.falls_at is not None and hold.fall is None:
            told.append(f"{label.name} at {hold.falls_at:,} (no run there has an accuracy)")
        elif hold and hold.falls_at is not None and hold.fall is not None:
            fall = hold.fall.times(100)
            doubt = "" if fall.clear else f", {_spread(fall)}"
            told.append(
                f"{label.name} at {hold.falls_at:,} ({MINUS}{amount(fall, 1)} from "
                f"{100 * hold.best.mean:.1f} % at {hold.best_at:,}{doubt})"
            )
    return f"The first fall below that: {'; '.join(told)}." if told else ""


def _passed_over(study: Study, points: float) -> str:
    """Batches on the way at which a method is not known to have held."""
    told = []
    for label in study.labels:
        hold = study.hold(label.name, points)
        if hold and hold.missing:
            told.append(f"{label.name} at {_listed([f'{b:,}' for b in hold.missing])}")
    return f"On the way no run has finished of {'; '.join(told)}." if told else ""


def _at_the_end(study: Study) -> str:
    """The best and the next at the largest batch that most methods share."""
    shared = [b for b in study.batches if len(study.best(b)) > 1]
    if not shared:
        return ""
    batch = max(shared, key=lambda b: (len(study.best(b)), b))
    first, second = study.best(batch)[:2]
    lead = study.difference(first, second, batch)
    assert lead is not None
    top = study.cells[first, batch].top1.times(100)
    return (
        f"At batch {batch:,} the highest mean is {first}'s, {amount(top, 1)} %, "
        f"{amount(lead.times(100), 1)} points above {second} ({_spread(lead)})."
    )


def _passes(study: Study, name: str | None) -> str | None:
    line = study.along(name) if name else []
    values = [a.mean for _, cell in line if (a := cell.amount("passes", per_step=True))]
    return f"{statistics.median(values):.2f}" if values else None


def _costs(study: Study, label: Label) -> str:
    mine = _passes(study, label.name)
    if mine is None:
        return ""
    others = [
        f"{passes} of {name}"
        for name in (label.sam_label, label.base_label)
        if name and (passes := _passes(study, name))
    ]
    against = f" against {_listed(others)}" if others else ""
    times = [t for b in study.batches if (t := study.cost(label, b, "seconds"))]
    time = f", and {ratio(times)} times the seconds of {label.base_label}" if times else ""
    return f"{label.name} with k={label.k} takes {mine} passes a step{against}{time}."


def _over_batches(study: Study, name: str, other: str) -> list[tuple[int, Amount]]:
    found = [(b, study.difference(name, other, b)) for b in study.batches]
    return [(b, d.times(100)) for b, d in found if d is not None]


def _at(rows: Sequence[tuple[int, Amount]]) -> str:
    return ", ".join(f"{batch:,} ({amount(d, 1)})" for batch, d in rows).replace("(-", f"({MINUS}")


def _keeps(study: Study, label: Label) -> str:
    """Its accuracy minus that of SAM at every step."""
    if label.sam_label is None:
        return ""
    rows = _over_batches(study, label.name, label.sam_label)
    if not rows:
        return f"{label.name} and {label.sam_label} share no batch."
    means = [d.mean for _, d in rows]
    clear = [(b, d) for b, d in rows if d.clear]
    judged = [d for _, d in rows if d.judged]
    told = f"Against {label.sam_label} its mean differs by {_span(means)} points"
    if not judged:
        return f"{told}; {_spread(max((d for _, d in rows), key=lambda d: (bool(d.sd), d.n)))}."
    few = "" if len(judged) == len(rows) else ", where there are seeds enough"
    if not clear:
        return f"{told}, within spread at {'every batch' if len(rows) > 1 else 'that batch'}{few}."
    rest = f" and within spread elsewhere{few}" if len(clear) < len(judged) else ""
    return f"{told}: by more than the spread at batch {_at(clear)}{rest}."


def _span(means: Sequence[float]) -> str:
    low, high = (f"{x:+.1f}".replace("-", MINUS) for x in (min(means), max(means)))
    return low if low == high else f"{low} to {high}"


def _gains(study: Study, label: Label) -> str:
    """How much of what SAM gains over its base is kept, where SAM's gain is clear."""
    found = kept(study, label)
    if found is None or found.gain.sd is None:
        return ""  # what is a gain and what is chance is not known
    sam, base, gain = label.sam_label, label.base_label, found.gain.times(100)
    if not gain.judged:
        return (
            f"What {label.name} has of {sam}'s gain over {base} is not told: it takes {FEWEST} "
            f"seeds of each that are not all equal."
        )
    where = f"At batch {found.batches[0]:,}"
    if len(found.batches) > 1:
        where = f"In the mean over batches {_listed([f'{b:,}' for b in found.batches])}"
    points = amount(gain, 1).replace("-", MINUS)
    if found.share is None or found.low is None or found.high is None:
        return (
            f"{where} {sam} itself gains nothing over {base} beyond the spread ({points} points), "
            f"so there is no gain to keep."
        )
    share, low, high = (
        f"{100 * x:.0f}".replace("-", MINUS) for x in (found.share, found.low, found.high)
    )
    return (
        f"{where} {sam} gains {points} points over {base}, more than the spread; {label.name} "
        f"keeps {share} % of that (95 % interval {low} to {high} %, bootstrap over seeds)."
    )
