"""Means over runs with their spread, and differences by seed with their intervals."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import ttest_1samp


@dataclass(frozen=True)
class MeanSd:
    """Values of n runs: their mean, sample standard deviation (None where n is 1) and range."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """The sample standard deviation."""
        return statistics.stdev(self.values) if self.n > 1 else None

    @property
    def n(self) -> int:
        """The number of runs."""
        return len(self.values)


def many(count: int, what: str) -> str:
    """A number with its noun: 1 run, 2 runs."""
    return f"{count:,} {what}{'s' * (count != 1)}"


@dataclass(frozen=True)
class Difference:
    """The mean over n seeds of one cell's accuracy minus another's, a fraction, and its interval.

    low and high: the 95 % interval; None where n is 1 or all differences are equal. n is 0 where
    the cells share no seed; the mean is then the difference of their means.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Difference":
        """From the differences at each seed, at least one."""
        mean, n = statistics.fmean(values), len(values)
        if max(values) - min(values) < 1e-12:  # equal but for rounding
            return cls(mean, None, None, n)
        interval = ttest_1samp(values, 0.0).confidence_interval(0.95)
        return cls(mean, float(interval.low), float(interval.high), n)

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and self.low * self.high > 0
