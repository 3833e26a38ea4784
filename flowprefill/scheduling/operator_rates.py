"""OperatorRates: how fast each kind of operator truly is, learnt from what executed; CostModel's.

Pure and deterministic. An observation is the executed time of one kind of segments, or of a whole
run, and the times that the calibrated rates predict for its parts. What is learnt is one factor for
each kind: the log of the factors is followed by a Kalman filter, which tells kinds apart by what
each observation is made of, moves the less the more it has seen, and lets no single one move it
far. Kinds not seen yet go along in part with those that are: a machine that was busy while it was
calibrated is faster than it says in everything.
"""

from __future__ import annotations

import math
from typing import NamedTuple

MOST = 8.0  # a factor is at most this, and at least the inverse
SHARED_SPREAD, OWN_SPREAD = 0.6, 0.35  # of the log before anything was seen: of all, of each kind
# Variance that a second of executed time adds, and each observation: the machine's speed changes.
DRIFT, LEAST_DRIFT = 0.003, 1e-4
SEGMENT_SPREAD = 0.3  # of the log of one segment's time
MISFIT = 0.05  # of the log: what the formula misses, however many segments there are
FARTHEST = 2.5  # standard deviations that one observation counts at most
KNOWN_SPREAD = 0.2  # of the log; a factor that is known no better plans no segments
ENOUGH_CHANGE = 1.15  # factors that differ by less are no reason for new plans


class OperatorTime(NamedTuple):
    """Executed segments of one kind: their work, by the rate that bounds it, and their time."""

    product_flops: float
    weight_bytes: float
    attention_flops: float
    cache_bytes: float
    other_s: float
    seconds: float
    segments: int


class Corrections(NamedTuple):
    """True over calibrated time of each kind of operator; above 1 it is slower than calibrated.

    Attributes:
        products: of products that are bound by multiplying.
        weights: of those bound by reading their weights.
        attention: of prefills.
        cache: of decode steps that are bound by reading keys and values.
    """

    products: float = 1.0
    weights: float = 1.0
    attention: float = 1.0
    cache: float = 1.0


NONE = Corrections()
KINDS = range(len(NONE))


class OperatorRates:
    """Learns the corrections. One thread at a time.

    Attributes:
        corrections: the best estimate.
        planned: what segments are to be cut by: changes only with a reason, so that few different
            plans are made. The bits of a result never depend on it.
    """

    def __init__(self) -> None:
        self.corrections = NONE
        self.planned = NONE
        self._logs = [0.0] * len(NONE)
        shared, own = SHARED_SPREAD**2, OWN_SPREAD**2
        self._most = shared + own
        self._covariance = [[shared + own * (i == j) for j in KINDS] for i in KINDS]

    def observe(
        self,
        parts: tuple[float, float, float, float],
        other_s: float,
        seconds: float,
        segments: int,
    ) -> None:
        """Learn from executed work; some 15 us.

        Args:
            parts: seconds that the calibrated rates predict for it, in the order of Corrections.
            other_s: predicted seconds that no factor corrects.
            seconds: it took.
            segments: how many were timed one by one; a whole run counts as some.
        """
        times = [factor * part for factor, part in zip(self.corrections, parts, strict=True)]
        predicted = other_s + sum(times)
        if not (sum(times) > 0 and seconds > 0 and math.isfinite(predicted + seconds)):
            return
        shares = [time / predicted for time in times]
        covariance = self._covariance
        for k in KINDS:
            if shares[k] > 0:
                more = (LEAST_DRIFT + DRIFT * seconds) * shares[k]
                covariance[k][k] += max(min(more, self._most - covariance[k][k]), 0.0)
        gains = [sum(row[k] * shares[k] for k in KINDS) for row in covariance]
        noise = MISFIT**2 + SEGMENT_SPREAD**2 / max(segments, 1)
        variance = sum(gains[k] * shares[k] for k in KINDS) + noise
        most = FARTHEST * math.sqrt(variance)
        error = min(max(math.log(seconds) - math.log(predicted), -most), most)
        for i in KINDS:
            moved = self._logs[i] + gains[i] * error / variance
            self._logs[i] = min(max(moved, -math.log(MOST)), math.log(MOST))
            for j in KINDS:
                covariance[i][j] -= gains[i] * gains[j] / variance
        self.corrections = Corrections(*map(math.exp, self._logs))
        self._plan_anew()

    def is_known(self, kind: int) -> bool:
        """Return whether enough was seen of a kind, by its place in Corrections."""
        return self._covariance[kind][kind] < KNOWN_SPREAD**2

    def _plan_anew(self) -> None:
        changes = zip(self.corrections, self.planned, strict=True)
        if any(
            self.is_known(kind) and max(new / old, old / new) > ENOUGH_CHANGE
            for kind, (new, old) in enumerate(changes)
        ):
            self.planned = self.corrections
