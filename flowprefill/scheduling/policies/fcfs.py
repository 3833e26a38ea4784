"""First come, first served: the baseline without preemption."""

# ruff: noqa: ARG002 (not every policy needs all that it is given)

from __future__ import annotations

from typing import TYPE_CHECKING

from flowprefill.scheduling.policies.base import BasePolicy
from flowprefill.scheduling.reasons import Reason
from flowprefill.scheduling.work import Rank, Verdict, Work

if TYPE_CHECKING:
    from collections.abc import Sequence


class FirstComeFirstServed(BasePolicy):
    """Prefills in order of arrival, packed while there is room; nothing is ever suspended.

    Decode steps take turns with whole prefills: between two prefills they run when due.
    """

    name = "fcfs"
    decode_preempts = False

    def rank(self, work: Work, now: float) -> Rank:
        """Order by arrival."""
        return Rank((work.arrival_s,))

    def should_preempt(self, current: Work, waiting: Sequence[Work], now: float) -> Verdict:
        """Never."""
        return Verdict(False, Reason.FIRST_COME)
