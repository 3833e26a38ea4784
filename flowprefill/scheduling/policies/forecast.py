"""Forecast: how much prefill time is likely to arrive and be due before a deadline; for plans."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowprefill.scheduling.work import Work

MEMORY_S = 5.0  # how long an arrival counts; longer reacts late, shorter takes chance for a trend
LULL = 3.0  # mean gaps without an arrival after which less is expected: a burst may be over
NEVER = (math.inf, 0.0)
NEGLIGIBLE = 1e-3  # share of the device's time that is not worth counting


class Forecast:
    """Shares of the device's time that arrivals of late asked for, by how soon they were due.

    A request due D after its arrival competes with one due at d if it arrives before d - D. With a
    share r of the device's time asked for by requests due within D, so much time will be taken by
    those that arrive between now and d - D, on average:

        r * (d - D - now), where that is positive

    Shares decay with MEMORY_S; D is rounded to half powers of two. Where arrivals come in bursts, a
    burst that is over would be expected to go on for seconds. So once nothing arrived for longer
    than LULL times the mean gap of late, all shares are divided by how many times longer it is.
    """

    def __init__(self) -> None:
        self._shares: dict[int, float] = {}  # by rounded D, ascending, as of _at
        self._count = 0.0  # arrivals of the last MEMORY_S or so, as of _at
        self._at = -math.inf

    def note(self, work: Work, now: float) -> None:
        """Count an arrival with a deadline."""
        objective_s = work.deadline_s - work.arrival_s
        if not 0 < objective_s < math.inf:
            return
        fade = self._fade(now)
        shares = {k: s * fade for k, s in self._shares.items() if s * fade > NEGLIGIBLE}
        step = round(2 * math.log2(objective_s))
        seconds = min(work.predicted_s, objective_s)
        shares[step] = shares.get(step, 0.0) + seconds / MEMORY_S
        self._count = self._count * fade + 1.0
        self._shares, self._at = dict(sorted(shares.items())), now

    def limits(self, works: Sequence[Work], now: float) -> list[float]:
        """Return each one's deadline less the time that arrivals due before it are to take.

        Args:
            works: in order of their deadlines. Protected and promised ones keep theirs.

        Cost: O(works + rounded Ds).
        """
        fade = self._fade(now) * self._going_on(now)
        shares = iter([(2 ** (step / 2), share * fade) for step, share in self._shares.items()])
        due_s, share = next(shares, NEVER)
        total = moment = 0.0
        limits = []
        for work in works:
            ahead_s = work.deadline_s - now
            while due_s < ahead_s:
                total += share
                moment += share * due_s
                due_s, share = next(shares, NEVER)
            taken_s = 0.0 if work.is_kept else total * ahead_s - moment
            limits.append(work.deadline_s - taken_s)
        return limits

    def _fade(self, now: float) -> float:
        return math.exp((self._at - now) / MEMORY_S)

    def _going_on(self, now: float) -> float:
        """Return by how much to believe that arrivals go on as of late, 0 to 1."""
        longest_s = LULL * MEMORY_S / self._count if self._count else math.inf
        return min(1.0, longest_s / max(now - self._at, 1e-9))
