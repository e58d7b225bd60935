"""Statistics of learning curves over seeds: costs until a threshold, means and their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from benchmarks.harness.results import Row

COSTS = ("tokens", "updates", "seconds")

# Two-sided 95% quantiles of Student's t by degrees of freedom from 1 on; beyond the last one it is conservative.
_T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Cost(NamedTuple):
    """A value with its 95% interval, which a bound and a mean of one value do not have."""

    value: float
    low: float | None = None
    high: float | None = None
    is_bound: bool = False

    def __str__(self) -> str:
        sign = "at least " if self.is_bound else ""
        interval = "" if self.low is None else f" ({self.low:.3g} to {self.high:.3g})"
        return f"{sign}{round(self.value, 9):.3g}{interval}"  # not 4e-17 for a difference of 0

    def times(self, factor: float) -> Cost:
        """Return the cost in another unit."""
        scaled = [None if x is None else x * factor for x in (self.low, self.high)]
        return Cost(self.value * factor, *scaled, self.is_bound)


def reached(row: Row, threshold: float, cost: str) -> float | None:
    """Return the cost until the mean of two successive evaluations is at the threshold; None if it never is.

    A mean belongs to the second of its evaluations. Between two means costs are interpolated linearly; otherwise they
    would be multiples of the cost between evaluations, and equal for that reason only.
    """
    points = list(zip(row[cost][1:], _pairs(row), strict=True))
    if points[0][1] >= threshold:
        return points[0][0]
    for (spent, low), (more, high) in pairwise(points):
        if high >= threshold:
            return spent + (more - spent) * (threshold - low) / (high - low)
    return None


def own_best(row: Row, cost: str) -> float:
    """Return the cost until the mean of two successive evaluations reached its maximum in the run."""
    pairs = _pairs(row)
    return row[cost][1 + pairs.index(max(pairs))]


def _pairs(row: Row) -> list[float]:
    """Return means of two successive evaluations each, since a single one is high by chance."""
    return [statistics.fmean(pair) for pair in pairwise(row["reward"])]


def mean_reward(row: Row) -> float:
    """Return the mean over all evaluations, the area under the curve, by which learning rates are chosen."""
    return statistics.fmean(row["reward"])


def mean(values: Sequence[float]) -> Cost:
    """Return the arithmetic mean with Student's interval."""
    center = statistics.fmean(values)
    if len(values) < 2:
        return Cost(center)
    reach = _T95[min(len(values) - 1, len(_T95)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Cost(center, center - reach, center + reach)


def geometric_mean(values: Sequence[float]) -> Cost:
    """Return the geometric mean of costs or their ratios, with the interval of the logarithms."""
    return Cost(*(None if x is None else math.exp(x) for x in mean([math.log(value) for value in values])[:3]))


def at_least(values: Sequence[float]) -> Cost:
    """Return the geometric mean of values some of which are lower bounds."""
    return Cost(geometric_mean(values).value, is_bound=True)
