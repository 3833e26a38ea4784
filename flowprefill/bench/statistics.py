"""Percentiles and summaries of measured times; used by every bench. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value below which a share of the values lies, interpolated between neighbours.

    Args:
        values: any order; at least one, or the answer is NaN.
        share: 0 is the smallest, 0.5 the median, 1 the largest.

    Raises:
        ValueError: share is not in [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share: got {share}, expected a number in [0, 1]")
    ordered = sorted(values)
    if not ordered:
        return math.nan
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def median(values: Iterable[float]) -> float:
    """Return the middle value; NaN of none."""
    return percentile(values, 0.5)


def quantiles(name: str, values: Iterable[float], shares: Iterable[float]) -> dict[str, float]:
    """Return ``{name}_p50_s`` and so on for a row of a report; share 1 is called ``max``."""
    ordered = sorted(values)
    return {
        f"{name}_{'max' if share == 1 else f'p{share * 100:g}'}_s": percentile(ordered, share)
        for share in shares
    }
