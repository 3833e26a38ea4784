"""Shortest remaining prefill first: best mean time to first token, no deadlines; for comparison."""

# ruff: noqa: ARG002 (not every policy needs all that it is given)

from __future__ import annotations

from flowprefill.scheduling.policies.base import BasePolicy
from flowprefill.scheduling.work import Rank, Work


class ShortestFirst(BasePolicy):
    """Orders by predicted remaining time and preempts for strictly less of it.

    Long prompts starve while short ones never let up.
    """

    name = "shortest_first"

    def rank(self, work: Work, now: float) -> Rank:
        """Order by what is left."""
        return Rank((work.remaining_s,))
