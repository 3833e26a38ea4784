"""Forecast: how much prefill time is likely to arrive and be due before a deadline; for plans."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowprefill.scheduling.work import Work

MEMORY_S = 5.0  # how long an arrival counts; longer reacts late, shorter takes chance for a trend
NEGLIGIBLE = 1e-3  # share of the device's time that is not worth counting


class Forecast:
    """Shares of the device's time that arrivals of late asked for, by how soon they were due.

    A request due D after its arrival competes with one due at d if it arrives before d - D. With a
    share r of the device's time asked for by requests due within D, so much time will be taken by
    those that arrive between now and d - D, on average:

        r * (d - D - now), where that is positive

    Shares decay with MEMORY_S; D is rounded to half powers of two.
    """

    def __init__(self) -> None:
        self._shares: dict[int, float] = {}  # by rounded D, as of _at
        self._at = -math.inf
        self._now = -math.inf
        self._current: list[tuple[float, float]] = []  # (D, share) as of _now

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
        self._shares, self._at, self._now = shares, now, -math.inf

    def before_s(self, deadline_s: float, now: float) -> float:
        """Return the time expected to be taken by arrivals from now on that are due before."""
        if now != self._now:
            fade = self._fade(now)
            self._current = [(2 ** (k / 2), s * fade) for k, s in self._shares.items()]
            self._now = now
        ahead_s = deadline_s - now
        return sum([s * (ahead_s - due_s) for due_s, s in self._current if due_s < ahead_s])

    def _fade(self, now: float) -> float:
        return math.exp((self._at - now) / MEMORY_S) if self._shares else 0.0
