"""LiveRun: a run that has not ended, its work and its requests; kept by the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowprefill.errors import FlowPrefillError, RequestFailed

if TYPE_CHECKING:
    from flowprefill.engine.live_request import LiveRequest
    from flowprefill.engine.worker import Logits, RunHandle
    from flowprefill.scheduling import Work


class LiveRun:
    """One live run; the engine's core keeps it until the run's terminal event.

    Attributes:
        requests: in the order of the run's rows of logits.
        computed: tokens of each request that are in the cache once the run has finished.
        is_preempting: it was dispatched over another run; `reason` says why.
    """

    __slots__ = ("computed", "is_preempting", "reason", "requests", "run", "work")

    def __init__(self, work: Work, run: RunHandle, requests: list[LiveRequest]) -> None:
        self.work = work
        self.run = run
        self.requests = requests
        self.computed = [len(request.ids) for request in requests]
        self.is_preempting = False
        self.reason = ""

    @property
    def name(self) -> str:
        """What the timeline calls it."""
        if self.work.kind == "prefill" and len(self.requests) == 1:
            return f"prefill {self.requests[0].id}"
        return f"{self.work.kind} of {len(self.requests)}"

    @property
    def blocking_s(self) -> float:
        """Longest time from one of its dispatches to its next segment, seconds."""
        return self.run.accounting().max_blocking_s

    def sample(self, outcomes: Logits | list[int], now: float) -> dict[str, FlowPrefillError]:
        """Sample a token for each request of the finished run and hand it to its reader.

        Args:
            outcomes: the run's logits, [requests, vocab], or the tokens the device chose.
            now: when they were made.

        Returns:
            Errors of those that failed, by request id. One request's bad logits do not end others.

        Thread: the event thread, without the engine's lock.
        """
        failures: dict[str, FlowPrefillError] = {}
        for row, request in enumerate(self.requests):
            if request.error is not None:
                continue
            try:
                token = request.advance(outcomes[row], now)
            except Exception as error:
                failures[request.id] = RequestFailed(f"request {request.id}: {error}")
                continue
            request.handle.push(token)
        return failures

    def account(self) -> None:
        """Note in the requests where the time of their first prefill went."""
        if self.work.kind == "decode":
            return
        accounting = self.run.accounting()
        for request in self.requests:
            if request.queue_s is None and accounting.first_start_s > 0:
                request.queue_s = max(accounting.first_start_s - request.arrival_s, 0.0)
                request.prefill_run_s = accounting.running_s
                request.suspended_s = accounting.suspended_s
                request.preemptions = accounting.num_preemptions
                request.blocking_s = accounting.max_blocking_s
