"""LiveRun: a run that has not ended, its work and its requests; kept by the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowprefill.errors import FlowPrefillError, RequestFailed
from flowprefill.request import POOLINGS

if TYPE_CHECKING:
    from flowprefill.engine.live_request import LiveRequest
    from flowprefill.engine.worker import RunHandle, Worker
    from flowprefill.request import RunOutput
    from flowprefill.scheduling import Work


class LiveRun:
    """One live run; the engine's core keeps it until the run's terminal event.

    Attributes:
        requests: in the order of the run's rows of logits.
        output: what the run gives.
        computed: tokens of each request that are in the cache once the run has finished.
        is_preempting: it was dispatched over another run; `reason` says why.
    """

    __slots__ = ("computed", "is_preempting", "output", "reason", "requests", "run", "work")

    def __init__(
        self,
        work: Work,
        run: RunHandle,
        requests: list[LiveRequest],
        output: RunOutput = "logits",
    ) -> None:
        self.work = work
        self.run = run
        self.requests = requests
        self.output = output
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

    def answer(self, worker: Worker, now: float) -> dict[str, FlowPrefillError]:
        """Give each request of the finished run what it is to have of it: a token, mostly.

        Args:
            worker: has the run's logits, the tokens the device chose, scores or embeddings.
            now: when they were made.

        Returns:
            Errors of those that failed, by request id. One request's bad logits do not end others.

        Thread: the event thread, without the engine's lock.
        """
        has_embeddings = self.output in POOLINGS
        outcomes = worker.embeddings(self.run) if has_embeddings else worker.outcomes(self.run)
        scores = worker.scores(self.run) if self.output == "scores" else None
        failures: dict[str, FlowPrefillError] = {}
        first = 0  # row of each prompt's scores, which a run has computed whole
        for row, (request, length) in enumerate(zip(self.requests, self.computed, strict=True)):
            own = None if scores is None else scores[first : first + length]
            first += length
            if request.error is not None:
                continue
            try:
                token = request.take(outcomes[row], own, now)
            except Exception as error:
                failures[request.id] = RequestFailed(f"request {request.id}: {error}")
                continue
            if token is not None:
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
