"""Fixed priorities, as in vLLM: the smaller number first, then by arrival; for comparison."""

# ruff: noqa: ARG002 (not every policy needs all that it is given)

from __future__ import annotations

from flowprefill.scheduling.policies.base import BasePolicy
from flowprefill.scheduling.work import Rank, Work


class FixedPriority(BasePolicy):
    """Orders by `Job.priority` and preempts for a strictly smaller number.

    Knows no deadlines; the lowest priority starves while higher ones never let up.
    """

    name = "priority"

    def rank(self, work: Work, now: float) -> Rank:
        """Order by priority; equal ones stay in order of arrival."""
        return Rank((float(work.priority),))
