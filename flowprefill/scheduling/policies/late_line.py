"""The lines of late and best-effort prefills: slack_edf grants their first ones slices of time."""

from __future__ import annotations

import heapq
import math
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowprefill.scheduling.interface import SchedulerSettings
    from flowprefill.scheduling.policies.shares import GuaranteedShares
    from flowprefill.scheduling.work import Work

COMPACT_AT = 64


class LateLines:
    """One line for each class with a guaranteed share, and one for all others.

    Works stand in the order in which they turned late (best effort: arrived), packed ones in the
    line of each of their classes. However busy the device is, the first in line is granted a slice
    of `late_slice_s` in every `late_slice_s / share`; the line of all others has `late_share`, and
    no grant before `late_patience_s`. A grant that must wait is made up for afterwards. So who
    turns late at t has received all its time by

        t + late_patience_s + (time of all in line up to itself + one slice) / share
          + one slice for each of those

    and for a class with a share, without the patience, plus (time of its protected) / share.
    """

    def __init__(self, settings: SchedulerSettings, shares: GuaranteedShares) -> None:
        self._settings, self._shares = settings, shares
        self._lines = {name: _Line() for name in ("", *settings.class_shares)}
        self._granted = -1  # serial of the work whose slice has come
        self._granted_at = math.inf  # when it came
        self._granted_line = ""  # in which line it was
        self._next_line = ""  # in which it is that the last next_grant() named
        self._slice_from_s: float | None = None  # the granted work's executed_s when it began

    def add(self, work: Work, now: float) -> None:
        """Put a work in line, where it stood before if it was in one; O(log n) amortised."""
        work.is_in_line = True
        if work.late_since_s is None:
            work.late_since_s = now
        classes = (job.service_class for job in work.jobs)
        for name in dict.fromkeys(name if name in self._lines else "" for name in classes):
            self._lines[name].add(work)

    def next_grant(self) -> tuple[Work | None, float]:
        """Return (who is granted the next slice, from when on); none while the first runs."""
        found: tuple[Work | None, float] = (None, math.inf)
        for name, line in self._lines.items():
            first = line.first()
            if first is None:
                if not name:
                    self._shares.forget_slices()
                continue
            assert first.late_since_s is not None
            patience_s = 0.0 if name else self._settings.late_patience_s
            at = max(first.late_since_s + patience_s, self._shares.free_at(name))
            if first.version >= 0 and at < found[1]:
                found, self._next_line = (first, at), name
        return found

    def grant(self, work: Work, due_at: float) -> None:
        """Note that the work that next_grant() named is to run now, as its slice was due."""
        self._granted, self._granted_at, self._slice_from_s = work.serial, due_at, None
        self._granted_line = self._next_line

    def slice_end(self, current: Work, now: float, *, begins: bool) -> float:
        """Return when the running work's slice ends; -inf if it has none.

        Args:
            begins: one that has not begun does so now; false: it would.
        """
        if current.serial != self._granted:
            return -math.inf
        if self._slice_from_s is None:
            if not begins:
                return now + self._settings.late_slice_s
            self._slice_from_s = current.executed_s
            self._shares.count_slice(self._granted_line, self._granted_at)
        return now + self._settings.late_slice_s - (current.executed_s - self._slice_from_s)


class _Line:
    """Works by late_since_s; those that have ended are dropped when they come up."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Work]] = []
        self._records = count()
        self._compact_at = COMPACT_AT

    def add(self, work: Work) -> None:
        assert work.late_since_s is not None
        heapq.heappush(self._heap, (work.late_since_s, next(self._records), work))
        if len(self._heap) > self._compact_at:
            self._heap = [record for record in self._heap if not record[2].has_ended]
            heapq.heapify(self._heap)
            self._compact_at = 2 * len(self._heap) + COMPACT_AT

    def first(self) -> Work | None:
        """Return who has waited longest and has not ended, running or not."""
        while self._heap and self._heap[0][2].has_ended:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None
