"""Gate: admits requests or refuses them by what waits and what is predicted; the core asks it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from flowprefill.errors import Overloaded
from flowprefill.scheduling.admission import (
    PrefillShare,
    Queued,
    Refusal,
    TenantBook,
    lateness_of,
    overload_of,
    tenant_overload_of,
)

if TYPE_CHECKING:
    from flowprefill.engine.kv_blocks import BlockPool
    from flowprefill.engine.live_request import LiveRequest
    from flowprefill.engine.memory_queue import MemoryQueue
    from flowprefill.scheduling import Scheduler
    from flowprefill.scheduling.admission import AdmissionLimits


class Gate:
    """Counts what waits for its first token. Not thread-safe: the core's lock guards it."""

    def __init__(
        self, scheduler: Scheduler, memory: MemoryQueue, pool: BlockPool, limits: AdmissionLimits
    ) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._memory = memory
        self._limits = limits
        self._share = PrefillShare()
        self._tenants = TenantBook()
        self._unanswered: dict[str, LiveRequest] = {}  # those that are counted there

    def set_scheduler(self, scheduler: Scheduler) -> None:
        """Ask another one from now on; nothing waits in either."""
        self._scheduler = scheduler

    def note(self, now: float) -> None:
        """Book the time since the last event; called before the scheduler hears of the next."""
        current = self._scheduler.current
        self._share.note(
            now,
            is_prefilling=current is not None and not current.is_decode,
            is_waiting=len(self._memory) > 0 or self._scheduler.load().backlog_s > 0,
        )

    def check(self, now: float, tenant: str, request: LiveRequest | None = None) -> None:
        """Refuse a request, or admit it, perhaps as best effort.

        Args:
            tenant: whose it is.
            request: None while its prompt is not tokenised: then only what waits already counts.

        Raises:
            Overloaded: too much waits, or of a class that rejects it is predicted late.
        """
        queued, limits = self._queued(now), self._limits
        tokens = 0 if request is None else request.num_prompt
        refusal = overload_of(queued, limits, tokens)
        if refusal is None and tenant and limits.tenant_share < 1:
            refusal = tenant_overload_of(self._queued_of(tenant, now), limits, tenant, tokens)
        if refusal is None and request is not None:
            refusal = self._lateness(request, now)
        if refusal is not None:
            raise Overloaded(refusal.message, retry_after_s=refusal.retry_after_s)

    def enter(self, request: LiveRequest) -> None:
        """Count a request in that was admitted."""
        cost_model = self._scheduler.cost_model
        job = request.job()
        request.predicted_s = cost_model.prefill_s(request.num_prompt, 0, job.head_rows)
        if request.request.tenant:
            self._unanswered[request.id] = request
            self._tenants.enter(request.request.tenant, request.num_prompt, request.predicted_s)

    def leave(self, request: LiveRequest) -> None:
        """Count a request out that has its first token or has ended; no effect the second time."""
        if self._unanswered.get(request.id) is request:
            del self._unanswered[request.id]
            self._tenants.leave(request.request.tenant, request.num_prompt, request.predicted_s)

    def predicted_ttft_s(self, request: LiveRequest, now: float) -> float:
        """Return the time from its arrival to its first token, as predicted now."""
        has_blocks = request.reservation is not None
        left_s = self._scheduler.predicted_ttft_s(request.job(), now, may_preempt=has_blocks)
        left_s += self._memory.seconds_before(request)
        return now - request.arrival_s + left_s * self._stretch()

    def _queued(self, now: float) -> Queued:
        load, memory = self._scheduler.load(now), self._memory
        return Queued(
            load.waiting_jobs + len(memory),
            load.waiting_tokens + memory.tokens,
            (load.backlog_s + memory.seconds) * self._stretch(),
        )

    def _queued_of(self, tenant: str, now: float) -> Queued:
        """Return what of one tenant waits; what has begun counts by the time that is left."""
        stretch = self._stretch()
        queued = self._tenants.of(tenant, stretch)
        for work, left in self._scheduler.begun(now):
            for request in filter(None, map(self._unanswered.get, work.job_ids)):
                if request.request.tenant == tenant:
                    queued.jobs -= 1
                    queued.tokens -= request.num_prompt
                    queued.backlog_s -= (1.0 - left) * request.predicted_s * stretch
        queued.backlog_s = max(queued.backlog_s, 0.0)
        return queued

    def _stretch(self) -> float:
        """Return how much longer than their prefills requests take; 1 where nothing decodes.

        As lately measured, but no less than by what the decode steps are due: what was measured
        knows nothing of sequences that began to decode when no prefill waited.
        """
        load = self._scheduler.load()
        is_shared = load.decoding or load.waiting_jobs or len(self._memory)
        measured = self._share.stretch if is_shared else 1.0
        return max(measured, 1.0 / (1.0 - self._scheduler.decode_share()))

    def _lateness(self, request: LiveRequest, now: float) -> Refusal | None:
        """Return why a request whose class rejects it is refused; or note what it is promised."""
        mode = request.service.admission
        if mode == "off" or request.slo.ttft is None:
            return None
        cached = self._pool.cached_tokens(request.ids) if request.finds_prefix else 0
        job = replace(
            request.job(),
            prompt_tokens=request.num_prompt - cached,
            context_tokens=cached,
            is_promised=True,
        )
        stretch, load = self._stretch(), self._scheduler.load()
        if load.backlog_s > 0 and job.decodes:  # as others that wait: steps take so much at most
            stretch = max(stretch, 1.0 / (1.0 - self._scheduler.settings.idle_share))
        outlook = self._scheduler.outlook(job, now, stretch, self._memory.seconds)
        lateness = lateness_of(job, outlook, now)
        request.is_promised = lateness is None
        if lateness is None or mode == "reject":
            return lateness
        if request.slo.on_miss == "demote":  # who wants to be dropped is, once all hope is gone
            request.is_demoted = True
        return None


def backlog_limit(seconds: float, *, is_calibrated: bool) -> float:
    """Return the bound on predicted seconds that holds: none where they are guessed."""
    return seconds if seconds and is_calibrated else math.inf
