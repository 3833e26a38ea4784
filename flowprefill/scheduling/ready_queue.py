"""All that waits for the device, in the policy's order: the scheduler's sorted queue.

Ranks that change with time carry the time at which they change, so nothing is re-sorted: a work is
ranked anew when that time has come. A sorted list rather than a heap: the first works are read at
every decision, and that costs nothing here. To push and to remove takes O(log n) comparisons and
moves up to n pointers, some microseconds at 10,000.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flowprefill.scheduling.policies.base import Policy
    from flowprefill.scheduling.work import Work

# (key, priority, serial, version, work): version is unique, so works are never compared.
_Record = tuple[tuple[float, ...], int, int, int, "Work"]
_COMPACT_AT = 64


class ReadyQueue:
    """Waiting jobs and suspended prefills, most urgent first."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._order: list[_Record] = []
        self._reviews: list[tuple[float, int, Work]] = []
        self._versions = count()
        self.total_s = 0.0

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, work: Work) -> bool:
        return work.version >= 0

    def push(self, work: Work, now: float) -> None:
        """Add a work, ranked as of now."""
        self.total_s += work.remaining_s
        self._record(work, now)

    def remove(self, work: Work) -> None:
        """Take a work out, wherever it stands."""
        self._unlink(work)
        work.version = -1
        self.total_s = self.total_s - work.remaining_s if self._order else 0.0
        self._policy.left(work)

    def review(self, now: float) -> None:
        """Rank anew all works whose rank has run out."""
        while self._reviews and self._reviews[0][0] <= now:
            _, version, work = heapq.heappop(self._reviews)
            if version == work.version:
                self._unlink(work)
                self._record(work, now)

    def first(self, limit: int) -> list[Work]:
        """Return the most urgent works in order."""
        return [record[4] for record in self._order[:limit]]

    def in_order(self) -> Iterator[Work]:
        """Yield works in order without taking them out; the queue must not change meanwhile."""
        for record in self._order:
            yield record[4]

    def _unlink(self, work: Work) -> None:
        place = (work.rank.key, work.priority, work.serial, work.version)
        index = bisect_left(self._order, place)
        if index == len(self._order) or self._order[index][4] is not work:  # another would be lost
            name = self._policy.name
            raise ValueError(
                f"policy {name!r}: it names a work that does not wait, or ranks one by NaN"
            )
        del self._order[index]

    def _record(self, work: Work, now: float) -> None:
        work.rank = self._policy.rank(work, now)
        if not work.rank.until > now:  # it would be ranked anew for ever
            name, until = self._policy.name, work.rank.until
            raise ValueError(f"policy {name!r}: rank until {until}, expected later than now, {now}")
        work.version = next(self._versions)
        insort(self._order, (work.rank.key, work.priority, work.serial, work.version, work))
        if work.rank.until < float("inf"):
            heapq.heappush(self._reviews, (work.rank.until, work.version, work))
            self._compact()

    def _compact(self) -> None:
        # Removed works leave dead reviews; rebuilt when they are the most, so the cost is O(1).
        if len(self._reviews) > 2 * len(self._order) + _COMPACT_AT:
            self._reviews = [review for review in self._reviews if review[1] == review[2].version]
            heapq.heapify(self._reviews)
