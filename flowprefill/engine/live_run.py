"""LiveRun: a run that has not ended, its work and its requests; kept by the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowprefill.errors import FlowPrefillError, RequestFailed
from flowprefill.request import POOLINGS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flowprefill.engine.handle import Waker
    from flowprefill.engine.live_request import LiveRequest, Outcome
    from flowprefill.engine.worker import Batch, RunHandle, Worker
    from flowprefill.scheduling import Work


class LiveRun:
    """One live run; the engine's core keeps it until the run's terminal event.

    Attributes:
        requests: in the order of the run's rows of logits.
        output: what the run gives.
        chooses: of each request, whether its next token is chosen by the run.
        made: requests with a token that `answer` has made and `hand_over` has not handed over.
        computed: tokens of each request that are in the cache once the run has finished.
        victims: ids of the runs that it was dispatched over.
    """

    __slots__ = (
        "_counted", "_gives_way_to", "_suspensions", "chooses", "computed", "made", "output",
        "requests", "run", "victims", "work",
    )  # fmt: skip

    def __init__(
        self,
        work: Work,
        run: RunHandle,
        requests: list[LiveRequest],
        batch: Batch,
    ) -> None:
        self.work = work
        self.run = run
        self.requests = requests
        self.output = batch.output
        self.chooses = [sequence.sampling is not None for sequence in batch.sequences]
        self.computed = [len(request.ids) for request in requests]
        self.made: list[LiveRequest] = []
        self.victims: set[int] = set()
        self._gives_way_to = ("", 0)  # why and to which run, by the last decision
        self._suspensions: list[tuple[str, int]] = []  # the same of those that happened
        self._counted = 0

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

    def gives_way(self, reason: str, run_id: int) -> None:
        """Note that it is to be suspended for another run; it may end, or go on, before it is."""
        self._count()
        self._gives_way_to = (reason, run_id)

    def preemptions(self, runs: Mapping[int, LiveRun]) -> list[tuple[str, float]]:
        """Return (why, how long the other waited) of suspensions that were not returned before.

        Those that happened, of itself and of its victims; to be called once it has ended.

        Args:
            runs: all live ones, itself included.
        """
        found = []
        for run in (self, *(runs[victim] for victim in self.victims if victim in runs)):
            run._count()
            for reason, other in run._suspensions:
                found.append((reason, runs[other].blocking_s if other in runs else 0.0))
            run._suspensions.clear()
        return found

    def _count(self) -> None:
        """Take note of what the executor has suspended since, for the last decision's reason."""
        times = self.run.accounting().num_preemptions
        self._suspensions += [self._gives_way_to] * (times - self._counted)
        self._counted = times

    def answer(self, worker: Worker, now: float) -> dict[str, FlowPrefillError]:
        """Have each request of the finished run take what it gives: a token, mostly, to hand over.

        Args:
            worker: has the run's logits, the tokens the device chose, scores or embeddings.
            now: when they were made.

        Returns:
            Errors of those that failed, by request id. One request's bad logits do not end others.

        Thread: the event thread, without the engine's lock.
        """
        outcomes = self._outcomes(worker)
        scores = worker.scores(self.run) if self.output == "scores" else None
        failures: dict[str, FlowPrefillError] = {}
        first = 0  # row of each prompt's scores, which a run has computed whole
        for row, (request, length) in enumerate(zip(self.requests, self.computed, strict=True)):
            own = None if scores is None else scores[first : first + length]
            first += length
            if request.error is not None:
                continue
            try:
                if request.take(outcomes[row], own, now):
                    self.made.append(request)
            except Exception as error:
                failures[request.id] = RequestFailed(f"request {request.id}: {error}")
        return failures

    def _outcomes(self, worker: Worker) -> Sequence[Outcome]:
        if self.output in POOLINGS:
            return list(worker.embeddings(self.run))
        if not any(self.chooses):
            return list(worker.logits(self.run))
        tokens = worker.chosen(self.run)
        if all(self.chooses):
            return tokens
        rows = worker.logits(self.run)
        return [tokens[i] if chosen else rows[i] for i, chosen in enumerate(self.chooses)]

    def hand_over(self) -> list[Waker]:
        """Hand over the tokens that were made; returns whom to wake, which needs no lock."""
        made, self.made = self.made, []
        return [waker for one in made for waker in one.handle.append(one.newest_token())]

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
