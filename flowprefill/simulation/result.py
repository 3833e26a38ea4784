"""Outcome and Result: what a simulation says of each request and of the whole."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flowprefill.scheduling import Decision, SchedulerEvent
    from flowprefill.simulation.device import Stretch
    from flowprefill.traces import TraceRequest

End = Literal["finished", "dropped"]


@dataclass(slots=True)
class Outcome:
    """How one request fared. Times are seconds on the trace's clock; durations are seconds.

    Attributes:
        number: its place in the trace.
        ttft_s: time to first token; inf: there was none.
        finished_s: when it ended.
        mean_itl_s: mean time between its tokens; 0 for a single one.
        preemptions: how many times its prefill was suspended.
        suspended_s: for how long in all.
        blocking_s: how long its prefill waited at most, once dispatched, for the run that executed.
        worker: which worker had it.
    """

    request: TraceRequest
    number: int
    ttft_s: float = math.inf
    finished_s: float = math.inf
    mean_itl_s: float = 0.0
    preemptions: int = 0
    suspended_s: float = 0.0
    blocking_s: float = 0.0
    end: End = "finished"
    worker: int = 0

    @property
    def is_on_time(self) -> bool:
        """Whether it met its objectives: the first token's and, over all tokens, the pace."""
        return self.ttft_s <= self.request.ttft_s and self.mean_itl_s <= self.request.tpot_s


@dataclass
class Result:
    """What a simulation found.

    Attributes:
        outcomes: of each request, in the order of the trace.
        events: how many events the scheduler was told.
        preemptions: how many times a run was suspended.
        blocking_s: each wait of a dispatched run for the segment that was executing.
        busy_s: how long the device was executing.
        span_s: from the first arrival to the last end.
        decisions: the last decisions, as (time, event, decision), if they were asked for.
        stretches: when which run was executing, if that was asked for.
    """

    outcomes: list[Outcome]
    events: int = 0
    preemptions: int = 0
    blocking_s: list[float] = field(default_factory=list)
    busy_s: float = 0.0
    span_s: float = 0.0
    decisions: deque[tuple[float, SchedulerEvent, Decision]] = field(default_factory=deque)
    stretches: list[Stretch] = field(default_factory=list)

    @property
    def attainment(self) -> float:
        """Share of the requests that met their objectives."""
        return attainment_of(self.outcomes)

    @property
    def utilisation(self) -> float:
        """Share of the span in which the device was executing."""
        return self.busy_s / self.span_s if self.span_s > 0 else 0.0

    def by_class(self) -> dict[str, list[Outcome]]:
        """Return the outcomes by service class, classes in the order of their first arrival."""
        classes: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            classes.setdefault(outcome.request.service_class, []).append(outcome)
        return classes

    def ttft_quantile(self, q: float) -> float:
        """Return a quantile of the time to first token, seconds."""
        return quantile([outcome.ttft_s for outcome in self.outcomes], q)


def attainment_of(outcomes: Iterable[Outcome]) -> float:
    """Return the share that is on time; NaN of none."""
    flags = [outcome.is_on_time for outcome in outcomes]
    return sum(flags) / len(flags) if flags else math.nan


def quantile(values: Sequence[float], q: float) -> float:
    """Return the smallest value that a share q of them does not exceed; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(max(math.ceil(q * len(ordered)) - 1, 0), len(ordered) - 1)]
