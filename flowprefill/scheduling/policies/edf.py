"""Earliest deadline first, as in the textbook; for comparison with slack_edf."""

# ruff: noqa: ARG002 (not every policy needs all that it is given)

from __future__ import annotations

from flowprefill.scheduling.policies.base import BasePolicy
from flowprefill.scheduling.work import Rank, Work


class EarliestDeadlineFirst(BasePolicy):
    """Orders by deadline and preempts for any strictly earlier one.

    Takes no account of remaining time: under overload it serves those that miss anyway. Best-effort
    jobs come last and starve while jobs with deadlines never let up.
    """

    name = "edf"

    def rank(self, work: Work, now: float) -> Rank:
        """Order by deadline."""
        return Rank((work.deadline_s,))
