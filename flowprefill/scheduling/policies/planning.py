"""Moore-Hodgson: which prefills can all be on time; slack_edf asks at every decision."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowprefill.scheduling.policies.forecast import Forecast
    from flowprefill.scheduling.work import Work


def plan(works: Sequence[Work], start_s: float, now: float, forecast: Forecast) -> Sequence[Work]:
    """Return those to be kept on time, one after another from `start_s` on; never none of some.

    First with the time set aside that arrivals are expected to take before each deadline (protected
    ones have theirs set aside already; admission sees to it for promised ones); if that leaves
    none, without.

    Args:
        works: in order of their deadlines.
    """
    kept = keepable(works, start_s, forecast.limits(works, now))
    if not kept:
        kept = keepable(works, start_s, [work.deadline_s for work in works])
    return kept or works[:1]


def keepable(works: Sequence[Work], start_s: float, limits: Sequence[float]) -> Sequence[Work]:
    """Return those that all end by their limits if they run one after another from `start_s` on.

    Where one ends late, the one with the most time left per weight among those so far is given up,
    of equal ones that of the tenant with the longest backlog; promised and protected ones last, and
    none of them for one that is neither, whose limit may be an earlier one.
    With equal weights, limits that never decrease and none of those, no other choice keeps more
    (Moore and Hodgson, 1968); with unequal weights it is a heuristic: the exact problem is NP-hard.

    Cost: O(n) when all can be kept, else O(n log n).
    """
    at = start_s
    for work, limit in zip(works, limits, strict=True):
        at += work.remaining_s
        if at > limit:
            return _most(works, start_s, limits)
    return works


def _most(works: Sequence[Work], start_s: float, limits: Sequence[float]) -> list[Work]:
    at = start_s
    # (standing, -time per weight, -backlog of its tenant, serial, time)
    heaviest: list[tuple[float, float, float, int, float]] = []
    given_up: set[int] = set()
    for work, limit in zip(works, limits, strict=True):
        seconds = work.remaining_s
        at += seconds
        per_weight = seconds / work.weight
        ahead_s = work.fair_arrival_s - work.arrival_s
        entry = (work.standing, -per_weight, -ahead_s, work.serial, seconds)
        heapq.heappush(heaviest, entry)
        while at > limit and heaviest and heaviest[0][0] <= work.standing:
            _, _, _, serial, freed_s = heapq.heappop(heaviest)
            at -= freed_s
            given_up.add(serial)
    return [work for work in works if work.serial not in given_up]
