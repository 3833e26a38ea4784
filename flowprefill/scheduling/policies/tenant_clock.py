"""TenantClock: from when each tenant's prefills count, so that no backlog delays other tenants."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowprefill.scheduling.work import Work

COMPACT_AT = 256  # tenants known before idle ones are dropped


class TenantClock:
    """Start-time fair queueing (Goyal, Vin and Cheng, 1996) over tenants.

    Each tenant has, in thought, a device of its own that serves its prefills in order of arrival.
    One that arrives at a counts as come at

        start = max(a, end of the tenant's one before),    end = start + its own time

    A tenant that asks for less than one device is not touched: its prefills count from their
    arrival. One that sends a hundred at once is: the last counts from when the other 99 would be
    done, and goes behind what other tenants sent meanwhile.
    """

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}

    def start_s(self, work: Work) -> float:
        """Return from when a prefill that arrived now would count."""
        return max(work.arrival_s, self._ends.get(work.jobs[0].tenant, -math.inf))

    def note(self, work: Work, now: float) -> None:
        """Set the `fair_arrival_s` of a prefill that arrives; without a tenant its arrival stays.

        Cost: O(1) amortised.
        """
        tenant = work.jobs[0].tenant
        if not tenant:
            return
        if len(self._ends) >= COMPACT_AT and tenant not in self._ends:
            self._ends = {name: end for name, end in self._ends.items() if end > now}
        work.fair_arrival_s = self.start_s(work)
        self._ends[tenant] = work.fair_arrival_s + work.nominal_s
