"""All that waits for the device, in the policy's order: the scheduler's heap with lazy deletion.

Ranks that change with time carry the time at which they change, so nothing is re-sorted: an
work is ranked anew when that time has come. Each operation is O(log n), amortised.
"""

from __future__ import annotations

import heapq
from itertools import count, islice
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
        self._size = 0
        self.total_s = 0.0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, work: Work) -> bool:
        return work.version >= 0

    def push(self, work: Work, now: float) -> None:
        """Add an work, ranked as of now."""
        self._size += 1
        self.total_s += work.remaining_s
        self._record(work, now)

    def remove(self, work: Work) -> None:
        """Take an work out, wherever it stands."""
        work.version = -1
        self._size -= 1
        self.total_s = self.total_s - work.remaining_s if self._size else 0.0
        self._policy.left(work)

    def review(self, now: float) -> None:
        """Rank anew all works whose rank has run out."""
        while self._reviews and self._reviews[0][0] <= now:
            _, version, work = heapq.heappop(self._reviews)
            if version == work.version:
                self._record(work, now)

    def head(self) -> Work | None:
        """Return the most urgent work, or None."""
        while self._order and self._order[0][3] != self._order[0][4].version:
            heapq.heappop(self._order)
        return self._order[0][4] if self._order else None

    def first(self, limit: int) -> list[Work]:
        """Return the most urgent works in order; O(limit log limit)."""
        return list(islice(self.in_order(), limit))

    def in_order(self) -> Iterator[Work]:
        """Yield works in order without taking them out; the queue must not change meanwhile.

        Walks the heap from its top, so the first k cost O(k log k) whatever its size.
        """
        self.head()
        if not self._order:
            return
        frontier: list[tuple[_Record, int]] = [(self._order[0], 0)]
        while frontier:
            record, index = heapq.heappop(frontier)
            if record[3] == record[4].version:
                yield record[4]
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(self._order):
                    heapq.heappush(frontier, (self._order[child], child))

    def _record(self, work: Work, now: float) -> None:
        work.rank = self._policy.rank(work, now)
        work.version = next(self._versions)
        heapq.heappush(self._order, (work.rank.key, work.priority, work.serial, work.version, work))
        if work.rank.until < float("inf"):
            heapq.heappush(self._reviews, (work.rank.until, work.version, work))
        self._compact()

    def _compact(self) -> None:
        # Removed works leave dead records; rebuilt when they are the most, so the cost is O(1).
        if len(self._order) > 2 * self._size + _COMPACT_AT:
            self._order = [record for record in self._order if record[3] == record[4].version]
            heapq.heapify(self._order)
        if len(self._reviews) > 2 * self._size + _COMPACT_AT:
            self._reviews = [review for review in self._reviews if review[1] == review[2].version]
            heapq.heapify(self._reviews)
