"""S-EDF as published (arXiv 2602.16603), known faults included; for comparison with slack_edf."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flowprefill.scheduling.policies.base import BasePolicy, Packing
from flowprefill.scheduling.work import Rank, Work

if TYPE_CHECKING:
    from collections.abc import Iterable

SLO_MARGIN = 0.1  # of the head's TTFT objective, kept free when packing


class PublishedSlackEdf(BasePolicy):
    """Priority sgn(slack) / deadline, the greatest first; preempts for any strictly greater one.

    slack = deadline - now - remaining. So those that can meet their deadline go by earliest
    deadline, and behind them those that cannot, the *latest* deadline first: they can starve.
    Packing looks at the head's deadline only. Deadlines are times on the caller's clock, > 0.

    Source: paper, scheduling policy and SLO-aware batching.
    """

    name = "s_edf_paper"

    def rank(self, work: Work, now: float) -> Rank:
        """Order by the published priority; it changes when slack runs out."""
        zero_at = work.deadline_s - work.remaining_s
        if now < zero_at:
            return Rank((-1.0 / work.deadline_s,), zero_at)
        if now == zero_at:
            return Rank((0.0,), math.nextafter(now, math.inf))
        return Rank((1.0 / work.deadline_s,))

    def batch(self, head: Work, waiting: Iterable[Work], now: float) -> list[Work]:
        """Pack in order while the head keeps a tenth of its objective as margin."""
        packing = Packing(head, self.cost_model, self.settings)
        margin = SLO_MARGIN * (head.deadline_s - head.arrival_s)
        for work in waiting:
            if packing.is_full:
                break
            if work is head or work.is_started:
                continue
            too_late = now + packing.seconds_with(work) > head.deadline_s - margin
            if not packing.fits(work) or too_late:
                break
            packing.add(work)
        return packing.members
