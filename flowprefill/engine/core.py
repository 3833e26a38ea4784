"""EngineCore: carries out the scheduler's decisions and turns the executor's events into tokens.

One lock guards scheduler, KV blocks and sequences. Whoever brings news (a submitting thread, a
cancelling one, the event thread) takes it, tells the scheduler and dispatches what it decides: an
urgent request stops a running one from the submitting thread itself. The event thread sleeps in
poll() until the executor has ended a run or the scheduler's timer is due. Tokens and results are
handed over without the lock. Long because all that the lock guards is here, to be read as one.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from flowprefill.engine.active_run import ActiveRun, RunMaker
from flowprefill.engine.event_thread import EventThread
from flowprefill.engine.memory_queue import MemoryQueue
from flowprefill.engine.outbox import Outbox
from flowprefill.engine.records import EngineObserver, decision_entry
from flowprefill.errors import (
    DeadlinePassed,
    FlowPrefillError,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestCancelled,
    RequestFailed,
)
from flowprefill.scheduling import (
    Arrival,
    Cancelled,
    Decision,
    Event,
    Failed,
    Finished,
    Scheduler,
    Threshold,
    TimerFired,
    Work,
)
from flowprefill.scheduling.admission import AdmissionLimits, refusal_of

if TYPE_CHECKING:
    from flowprefill.engine.device import NativeExecutor, NativeRun
    from flowprefill.engine.kv_blocks import BlockPool
    from flowprefill.engine.sequence import Sequence
    from flowprefill.request import FinishReason

log = logging.getLogger(__name__)

KEPT_DECISIONS = 1000
KEPT_RUN_NAMES = 8192


class EngineCore:
    """The engine behind the public class: no tokenizer, no checkpoint, only runs and sequences."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: NativeExecutor,
        pool: BlockPool,
        model: RunMaker,
        limits: AdmissionLimits,
    ) -> None:
        """Join the parts; `start` begins."""
        self._scheduler = scheduler
        self._executor = executor
        self._pool = pool
        self._model = model
        self._limits = limits
        self._lock = threading.Lock()
        self._live: dict[str, Sequence] = {}
        self._memory = MemoryQueue(pool)
        self._runs: dict[int, ActiveRun] = {}
        self._news: deque[Event] = deque()
        self._outbox = Outbox()
        self._threshold: tuple[Threshold, NativeRun] | None = None  # of the current run
        self.has_failed = False  # for good: see _fail_all
        self._refusal = ""  # why new requests are refused; empty: they are not
        self._idle = threading.Condition(self._lock)
        self._events = EventThread(
            executor.event_fd, self._handle_events, self._handle_timer, self._handle_failure
        )
        self._is_stopped = False
        self._closing = threading.Lock()
        self.observers: list[EngineObserver] = []
        self.decisions: deque[dict[str, Any]] = deque(maxlen=KEPT_DECISIONS)
        self.run_names: OrderedDict[int, str] = OrderedDict()

    # ---- called from any thread ----------------------------------------------------------------

    def start(self) -> None:
        """Start the event thread; the executor runs already."""
        self._events.start()

    def stop_early(self, tokens: int, deadline_s: float) -> NativeRun | None:
        """Suspend the current run if it is known that a request to come will.

        Deciding takes a few tenths of a millisecond; by then the run is at its boundary. Takes no
        lock, so what it looks at may be a moment old: `let_go_on` must follow, come what may.

        Args:
            tokens: of its prompt. deadline_s: when its first token is due.

        Returns:
            The run that was stopped, for `let_go_on`.
        """
        known = self._threshold
        if known is None:
            return None
        threshold, run = known
        prefill_s = self._scheduler.cost_model.prefill_s(tokens)
        if not threshold.is_passed(prefill_s, deadline_s, time.monotonic()):
            return None
        return run if self._executor.suspend(run, yields=True) else None

    def let_go_on(self, run: NativeRun) -> None:
        """Resume a run that was stopped early unless the scheduler has decided so too."""
        with self._lock:
            current = self._scheduler.current
            active = self._runs.get(current.id) if current is not None else None
            if active is not None and active.run is run:
                with suppress(ValueError):  # it has ended in this moment; its event is on the way
                    self._executor.dispatch(run)

    def submit(self, sequence: Sequence) -> None:
        """Admit a request and let the scheduler decide, in this thread.

        Raises:
            NotReady: the engine is closing. Overloaded: too much waits. InvalidRequest: its id is
            that of a live request. In each case nothing has changed.
        """
        with self._lock:
            if self._refusal:
                raise NotReady(self._refusal)
            self._check_load(sequence)
            self._live[sequence.id] = sequence
            self._memory.push(sequence)
            self._settle()
            if not sequence.is_ended:  # after the dispatch: nobody waits for a prediction
                now = time.monotonic()
                left_s = self._scheduler.predicted_ttft_s(sequence.job(), now)
                sequence.handle.predicted_ttft = now - sequence.arrival_s + left_s
        self._deliver()

    def cancel(self, sequence: Sequence) -> None:
        """End a request early: at the next boundary if its run is executing."""
        with self._lock:
            if not sequence.is_ended and sequence.error is None and sequence.id in self._live:
                sequence.cancelled_at_s = time.monotonic()
                error = RequestCancelled(f"request {sequence.id} was cancelled")
                self._end_early(sequence, error, "cancelled")
                self._settle()
        self._deliver()

    def close(self, timeout: float | None) -> None:
        """Refuse new requests, wait for the live ones, cancel the rest, stop all threads."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._refusal = self._refusal or "the engine is shutting down"
            while self._live:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._idle.wait(left)
            rest = list(self._live.values())
        for sequence in rest:
            self.cancel(sequence)
        self._wait_until_idle()
        with self._closing:  # one thread closes, others wait for it
            if self._is_stopped:
                return
            self._is_stopped = True
            self._events.stop()
            self._executor.stop()

    def counts(self) -> tuple[int, int, int]:
        """Return how many requests run or decode, wait, and are suspended."""
        with self._lock:
            load = self._scheduler.load()
            # The scheduler of an engine that has failed may still count what is gone.
            waiting = min(load.waiting_jobs + len(self._memory), len(self._live))
            suspended = sum(
                len(active.sequences)
                for active in self._runs.values()
                if active.work.kind == "prefill" and active.work is not self._scheduler.current
            )
            return max(len(self._live) - waiting - suspended, 0), waiting, suspended

    def set_max_blocking(self, seconds: float) -> None:
        """Tell the scheduler how long segments are from now on.

        Raises:
            RuntimeError: requests are live, or a run is; nothing has changed.
        """
        with self._lock:
            if self._live or self._runs:
                raise RuntimeError(f"{len(self._live)} requests are live, expected an idle engine")
            self._scheduler.settings.max_blocking_s = seconds

    # ---- admission -----------------------------------------------------------------------------

    def _check_load(self, sequence: Sequence) -> None:
        if sequence.id in self._live:
            raise InvalidRequest.field("id", sequence.id, "an id that no live request has")
        limits = self._limits
        counts_only = not limits.max_waiting_tokens and limits.max_backlog_s == math.inf
        if counts_only and not limits.refuse_late and len(self._live) < limits.max_waiting:
            return  # what waits is less than what lives
        now, job = time.monotonic(), sequence.job()
        predicted_s = self._scheduler.predicted_ttft_s(job, now) if limits.refuse_late else 0.0
        load = self._scheduler.load()
        load.waiting_jobs += len(self._memory)
        load.waiting_tokens += self._memory.tokens
        refusal = refusal_of(job, load, limits, now, predicted_s)
        if refusal is not None:
            raise Overloaded(refusal.message, retry_after_s=refusal.retry_after_s)

    def _admit(self) -> None:
        for sequence in self._memory.admit(time.monotonic()):
            if not sequence.tokens:
                sequence.cached_tokens = sequence.handle.cached_tokens = sequence.computed
            sequence.is_scheduled = True
            self._news.append(Arrival(sequence.job()))

    # ---- decisions -----------------------------------------------------------------------------

    def _settle(self) -> None:
        """Admit what fits and tell the scheduler all news, until nothing is new. Lock held."""
        try:
            self._settle_news()
            self._threshold = self._known_threshold()
        except Exception as error:  # ours, or of a policy: nobody may wait for ever because of it
            log.exception("the engine has failed")
            self._threshold = None
            self._fail_all(error)
        if not self._live:
            self._idle.notify_all()

    def _known_threshold(self) -> tuple[Threshold, NativeRun] | None:
        current = self._scheduler.current
        active = self._runs.get(current.id) if current is not None else None
        threshold = self._scheduler.threshold() if active is not None else None
        return (threshold, active.run) if active is not None and threshold is not None else None

    def _settle_news(self) -> None:
        self._admit()
        while self._news:
            event = self._news.popleft()
            start = time.monotonic()
            decision = self._scheduler.on_event(event, start)
            self._outbox.decisions_s.append(time.monotonic() - start)
            self._carry_out(decision)
            self.decisions.append(decision_entry(event, decision, start))
            if not self._news:
                self._admit()

    def _carry_out(self, decision: Decision) -> None:
        for work in decision.cancel:
            if work.id in self._runs:
                self._executor.cancel(self._runs[work.id].run)
        for job_id, reason in decision.dropped:
            sequence = self._live.get(job_id)
            if sequence is None:
                continue  # it has failed in this moment
            sequence.is_scheduled = False  # the scheduler has ended its job by itself
            self._end_early(sequence, DeadlinePassed(f"request {job_id}: {reason}"), "expired")
        if decision.dispatch is not None:
            self._dispatch(decision, decision.dispatch)
        self._events.set_timer(math.inf if decision.wake_at is None else decision.wake_at)

    def _dispatch(self, decision: Decision, work: Work) -> None:
        active, victim = self._runs.get(work.id), decision.preempted
        if active is None:
            if victim is not None and victim.id in self._runs:
                # It stops while the newcomer's run is built: a boundary missed costs a segment.
                self._executor.suspend(self._runs[victim.id].run)
            active = self._start_run(work)
        if active is None:
            return
        if victim is not None:
            active.is_preempting, active.reason = True, decision.reason
        try:
            self._executor.dispatch(active.run)
        except ValueError:
            return  # it has ended in this moment; its event is on the way

    def _start_run(self, work: Work) -> ActiveRun | None:
        """Build the run of a work that starts; None if that failed and its requests with it."""
        sequences = [self._live[job_id] for job_id in work.job_ids if job_id in self._live]
        if work.kind == "decode":
            sequences = self._with_blocks(sequences)
        try:
            run = self._model.make_run(work.id, sequences)
        except Exception as error:  # whatever it is: these requests fail, the engine goes on
            for sequence in sequences:
                self._fail(sequence, RequestFailed(f"request {sequence.id}: {error}"))
            self._news.append(Failed(work.id))
            return None
        for sequence in sequences:
            sequence.work_id = work.id
        active = self._runs[work.id] = ActiveRun(work, run, sequences)
        self.run_names[work.id] = active.name
        while len(self.run_names) > KEPT_RUN_NAMES:
            self.run_names.popitem(last=False)
        return active

    def _with_blocks(self, sequences: list[Sequence]) -> list[Sequence]:
        """Give each decoding sequence room for its next token; returns those that got it."""
        kept, evicted = self._memory.make_room(sequences, self._live.values())
        for sequence in evicted:
            sequence.is_scheduled = False
            self._news.append(Cancelled(sequence.id))
        return kept

    # ---- ends ----------------------------------------------------------------------------------

    def _end_early(self, sequence: Sequence, error: FlowPrefillError, reason: FinishReason) -> None:
        """End a request before its time; its blocks stay until the run that uses them has ended."""
        sequence.error = error
        sequence.finish_reason = reason
        if sequence.is_scheduled:
            sequence.is_scheduled = False
            self._news.append(Cancelled(sequence.id))
        if sequence.work_id is None:
            self._free(sequence)

    def _fail(self, sequence: Sequence, error: FlowPrefillError) -> None:
        """End a request whose run is over. The scheduler learns it with the run's end."""
        if sequence.error is None:
            sequence.error, sequence.finish_reason = error, "failed"
        sequence.work_id = None
        self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        """The one place where a request ends: blocks freed, forgotten, result to be delivered."""
        assert not sequence.is_ended
        sequence.is_ended = True
        if sequence.reservation is None:
            self._memory.remove(sequence)
        else:
            self._pool.release(sequence.reservation)
            sequence.reservation = None
            self._memory.blocks_freed()
        if sequence.cancelled_at_s is not None:
            sequence.cancel_to_free_s = time.monotonic() - sequence.cancelled_at_s
        del self._live[sequence.id]
        self._outbox.ended.append(sequence)

    def _deliver(self) -> None:
        """Hand over what has ended and tell the observers. No lock held."""
        with self._lock:
            outbox, self._outbox = self._outbox, Outbox()
        outbox.deliver(self.observers)

    def _wait_until_idle(self) -> None:
        with self._lock:
            while self._live or self._runs:
                self._idle.wait()  # whatever empties one of them settles afterwards

    # ---- the event thread ----------------------------------------------------------------------

    def _handle_events(self) -> None:
        for kind, run, _ in self._executor.pop_events():
            if kind == "suspended":
                continue
            try:
                self._handle_end_of_run(run.id, kind)
            except Exception as error:  # a bug of ours; its event will not come again
                log.exception("the end of run %d could not be handled", run.id)
                self._runs.pop(run.id, None)
                self._handle_failure(error)

    def _handle_timer(self) -> None:
        with self._lock:
            self._news.append(TimerFired())
            self._settle()
        self._deliver()

    def _handle_failure(self, error: Exception) -> None:
        with self._lock:
            self._fail_all(error)
            self._settle()
        self._deliver()

    def _handle_end_of_run(self, run_id: int, kind: str) -> None:
        """Tokens first, then the scheduler: whoever waits for a first token gets it at once."""
        active = self._runs[run_id]
        failures: dict[str, FlowPrefillError] = {}
        if kind == "finished":
            failures = active.sample(self._model.outcomes(active.run))
        with self._lock:
            del self._runs[run_id]
            active.account()
            if active.is_preempting:
                self._outbox.preemptions.append((active.reason, active.blocking_s))
            if kind == "failed":
                for sequence in active.sequences:
                    message = f"request {sequence.id}: {active.run.error}"
                    self._fail(sequence, RequestFailed(message))
                self._news.append(Failed(run_id))
            else:
                ends = self._release_sequences(active, failures, is_finished=kind == "finished")
                executed_s = active.run.accounting()["running_s"]
                if kind == "finished":
                    self._news.append(Finished(run_id, ends, executed_s))
            self._settle()
        self._deliver()

    def _fail_all(self, error: Exception) -> None:
        """End every request and refuse new ones: what scheduler and engine know may not agree."""
        self.has_failed = True
        self._refusal = f"the engine has failed: {error}"
        self._news.clear()
        for active in self._runs.values():
            self._executor.cancel(active.run)
        for sequence in tuple(self._live.values()):
            sequence.is_scheduled = False
            if sequence.error is None:
                message = f"request {sequence.id}: internal error: {error}"
                sequence.error, sequence.finish_reason = RequestFailed(message), "failed"
            if sequence.work_id not in self._runs:
                self._free(sequence)

    def _release_sequences(
        self, active: ActiveRun, failures: dict[str, FlowPrefillError], *, is_finished: bool
    ) -> frozenset[str]:
        """Give a run's sequences back; returns the ids of those that have ended with it."""
        ends: set[str] = set()
        for sequence, computed in zip(active.sequences, active.computed, strict=True):
            assert sequence.reservation is not None
            sequence.work_id = None
            if sequence.id in failures:
                blocks = sequence.reservation.block_ids[sequence.reservation.committed_blocks :]
                self._model.zero_blocks(blocks)
                if sequence.error is None:
                    sequence.error, sequence.finish_reason = failures[sequence.id], "failed"
            elif is_finished:
                sequence.computed = computed
                self._pool.commit(sequence.reservation, sequence.ids[:computed])
                sequence.end_with_last_token()
            if sequence.finish_reason is not None:
                if sequence.is_scheduled:
                    ends.add(sequence.id)
                self._free(sequence)
        return frozenset(ends)
