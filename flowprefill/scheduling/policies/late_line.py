"""The line of late and best-effort prefills: slack_edf grants its first a share of the time."""

from __future__ import annotations

import heapq
import math
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowprefill.scheduling.work import Work

_COMPACT_AT = 64


class LateLine:
    """Works in the order in which they turned late (best effort: arrived).

    However busy the device is, the first in line is granted a slice of `slice_s` in every
    `slice_s / share` from `patience_s` after it turned late. A grant that must wait is made up for
    afterwards. So who turns late at t has received all its time by

        t + patience_s + (time of all in line up to itself) / share + one slice for each of those
    """

    def __init__(self, share: float, patience_s: float, slice_s: float) -> None:
        self._share, self._patience_s, self._slice_s = share, patience_s, slice_s
        self._line: list[tuple[float, int, Work]] = []  # heap of (late since, number, work)
        self._records = count()
        self._compact_at = _COMPACT_AT
        self._next_grant_s = -math.inf

    def add(self, work: Work, now: float) -> None:
        """Put a work in line, where it stood before if it was in one; O(log n) amortised."""
        work.is_in_line = True
        if work.late_since_s is None:
            work.late_since_s = now
        heapq.heappush(self._line, (work.late_since_s, next(self._records), work))
        if len(self._line) > self._compact_at:
            self._line = [record for record in self._line if not record[2].has_ended]
            heapq.heapify(self._line)
            self._compact_at = 2 * len(self._line) + _COMPACT_AT

    def first(self) -> Work | None:
        """Return who has waited longest and has not ended, running or not; None: no work."""
        while self._line and self._line[0][2].has_ended:
            heapq.heappop(self._line)
        if not self._line:
            self._next_grant_s = -math.inf
            return None
        return self._line[0][2]

    def grant_at(self, first: Work) -> float:
        """Return when the first in line is granted its next slice."""
        assert first.late_since_s is not None
        eligible = first.late_since_s + self._patience_s
        if self._next_grant_s == -math.inf:
            self._next_grant_s = eligible
        return max(self._next_grant_s, eligible)

    def count_slice(self) -> None:
        """Note that a slice has begun: the next is due slice / share later."""
        self._next_grant_s += self._slice_s / self._share
