"""Ratios of paired measurements with 95 % confidence intervals. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, two-sided 95 %, by degrees of freedom from 1; beyond them the normal's.
STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL = 1.96


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the ends of its 95 % confidence interval; NaN ends with fewer than two values."""

    mean: float
    low: float
    high: float
    count: int


def mean_interval(
    values: Sequence[float], *, least: float = -math.inf, most: float = math.inf
) -> Interval:
    """Return the mean of independent values with its interval by Student's t.

    Args:
        least: what none of the values can be below; the interval ends there too.
        most: likewise above.
    """
    count = len(values)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = sum(values) / count
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    t = STUDENT_T[count - 2] if count - 2 < len(STUDENT_T) else NORMAL
    half = t * math.sqrt(variance / count)
    return Interval(mean, max(mean - half, least), min(mean + half, most), count)


def share_interval(values: Sequence[float]) -> Interval:
    """Return the mean of shares, each from 0 to 1, with its interval."""
    return mean_interval(values, least=0.0, most=1.0)


def ratio_interval(tops: Sequence[float | None], bottoms: Sequence[float | None]) -> Interval:
    """Return the geometric mean of paired ratios top / bottom with its interval.

    Pairs of which one is None (a target out of reach on that sample) are left out; `count` says
    how many remain.
    """
    logs = [
        math.log(top / bottom)
        for top, bottom in zip(tops, bottoms, strict=True)
        if top is not None and bottom is not None
    ]
    found = mean_interval(logs)
    if found.count == 0:
        return found
    return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.count)
