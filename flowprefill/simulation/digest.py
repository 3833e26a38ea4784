"""Digest: quantiles of many values in bounded memory; a cluster's result is made of them."""

from __future__ import annotations

import math

STEP = 1.01  # ratio of neighbouring buckets: quantiles are right within one per cent
_LOG_STEP = math.log(STEP)
_SMALLEST = 1e-9
_NONE, _NEVER = -(1 << 30), 1 << 30  # buckets of 0 and of inf


class Digest:
    """Counts of values >= 0 in buckets of one per cent; inf is one too."""

    def __init__(self) -> None:
        self.count = 0
        self.max = 0.0
        self._buckets: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Count a value."""
        if value == math.inf:
            bucket = _NEVER
        elif value > _SMALLEST:
            bucket = math.ceil(math.log(value) / _LOG_STEP)
        else:
            bucket = _NONE
        self.count += 1
        self.max = max(self.max, value)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def quantile(self, q: float) -> float:
        """Return a value that a share q does not exceed, up to one per cent more; NaN of none."""
        if not self.count:
            return math.nan
        left = max(math.ceil(q * self.count), 1)
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                break
        if bucket in (_NONE, _NEVER):
            return 0.0 if bucket == _NONE else math.inf
        return min(STEP**bucket, self.max)
