"""Outbox: what the core has to tell others once it has let go of its lock."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowprefill.engine.records import EngineObserver, RequestRecord

if TYPE_CHECKING:
    from flowprefill.engine.live_request import LiveRequest

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Outbox:
    """Filled under the core's lock, delivered without it.

    Attributes:
        ended: requests whose blocks are freed, to be told to their handles.
        preemptions: why, and how long from dispatch to first segment, seconds.
        decisions_s: how long each scheduling decision took, seconds.
    """

    ended: list[LiveRequest] = field(default_factory=list)
    preemptions: list[tuple[str, float]] = field(default_factory=list)
    decisions_s: list[float] = field(default_factory=list)

    def deliver(self, observers: list[EngineObserver], now: float) -> None:
        """Tell the observers, then the handles: a client that has a result finds it counted."""
        for observer in observers:
            try:
                self._tell(observer, now)
            except Exception:  # an observer's bug must not cost a client its result
                log.exception("an observer of the engine failed")
        for request in self.ended:
            request.deliver(now)

    def _tell(self, observer: EngineObserver, now: float) -> None:
        for request in self.ended:
            observer.on_end(_record_of(request, now))
        for reason, ack_s in self.preemptions:
            observer.on_preemption(reason, ack_s)
        for seconds in self.decisions_s:
            observer.on_decision(seconds)


def _record_of(request: LiveRequest, now: float) -> RequestRecord:
    times = request.token_times_s
    assert request.finish_reason is not None
    return RequestRecord(
        request_id=request.id,
        slo=request.slo,
        timings=request.timings(now),
        finish_reason=request.finish_reason,
        prompt_tokens=request.num_prompt,
        output_tokens=request.output_tokens,
        token_gaps_s=tuple(b - a for a, b in itertools.pairwise(times)),
        cancel_to_free_s=request.cancel_to_free_s,
        blocking_s=request.blocking_s,
    )
