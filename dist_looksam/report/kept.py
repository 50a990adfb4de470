"""How much of SAM's gain over its base a method keeps: a ratio of sums, and what seeds do to it.

Its interval is a percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap,
1993, chapter 13): the seeds of every method and batch are drawn anew, with replacement.
"""

import math
from dataclasses import dataclass

import numpy as np

from dist_looksam.report.study import Amount, Label, Study

DRAWS = 10_000
_WITHIN = (2.5, 97.5)  # percentiles
_SEED = 0  # so that the same runs give the same page


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Of one method, over all batches at which it, SAM and the base have runs.

    gain is SAM's, a fraction, in the mean over these batches; its n is the fewest seeds of any of
    the three. share, low and high are None where the gain is not clear.
    """

    batches: tuple[int, ...]
    gain: Amount
    share: float | None = None
    low: float | None = None
    high: float | None = None


def kept(study: Study, label: Label) -> Kept | None:
    """None where `label` has no SAM or no base to compare with, or shares no batch with both."""
    if label.sam_label is None or label.base_label is None:
        return None
    names = (label.name, label.sam_label, label.base_label)
    batches = tuple(b for b in study.batches if all(study.of(name, b) for name in names))
    if not batches:
        return None
    values = [[study.cells[name, batch].values for batch in batches] for name in names]
    gain = _gain(study, names, batches)
    draws = np.random.default_rng(_SEED)
    mine, sam, base = (sum(_means(seeds, draws) for seeds in row) for row in values)
    if not gain.clear or np.percentile(sam - base, _WITHIN[0]) <= 0:
        return Kept(batches=batches, gain=gain)
    mean_mine, mean_sam, mean_base = (sum(map(np.mean, row)) for row in values)
    low, high = np.percentile((mine - base) / (sam - base), _WITHIN)
    share = float((mean_mine - mean_base) / (mean_sam - mean_base))
    return Kept(batches=batches, gain=gain, share=share, low=float(low), high=float(high))


def _gain(study: Study, names: tuple[str, str, str], batches: tuple[int, ...]) -> Amount:
    """SAM minus base, in the mean over batches, its spread that of one run of each."""
    rows = [study.cells[names[1], b].top1.minus(study.cells[names[2], b].top1) for b in batches]
    spreads = [d.sd for d in rows if d.sd is not None]
    sd = math.hypot(*spreads) / len(rows) if len(spreads) == len(rows) else None
    fewest = min(study.cells[name, b].top1.n for name in names for b in batches)
    return Amount(sum(d.mean for d in rows) / len(rows), sd, fewest)


def _means(seeds: list[float], draws: np.random.Generator) -> np.ndarray:
    """DRAWS means of as many values as there are, drawn with replacement."""
    return np.array(seeds)[draws.integers(len(seeds), size=(DRAWS, len(seeds)))].mean(axis=1)
