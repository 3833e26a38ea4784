"""EngineCore: carries out the scheduler's decisions and turns the executor's events into tokens.

One lock guards scheduler, KV blocks and requests. Any thread with an event (one that submits or
cancels, the event thread) takes the lock, calls the scheduler and carries out its decision: an
urgent request stops a running one from the submitting thread itself. The event thread waits in
`Worker.poll` until a run has ended or the scheduler's timer is due. Tokens and results are handed
over without the lock. Long because all that the lock guards is here, to be read as one.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import OrderedDict, deque
from functools import partial
from typing import TYPE_CHECKING, Any

from flowprefill.engine.event_thread import EventThread
from flowprefill.engine.gate import Gate
from flowprefill.engine.handle import waited_at_most, wake
from flowprefill.engine.interruptible_lock import InterruptibleLock, do_elsewhere
from flowprefill.engine.live_run import LiveRun
from flowprefill.engine.memory_queue import MemoryQueue
from flowprefill.engine.outbox import Outbox
from flowprefill.engine.records import EngineObserver, decision_entry
from flowprefill.engine.stories import Stories
from flowprefill.engine.worker import Batch
from flowprefill.errors import (
    DeadlinePassed,
    FlowPrefillError,
    InvalidRequest,
    NotReady,
    RequestCancelled,
    RequestFailed,
)
from flowprefill.scheduling import (
    Arrival,
    Cancelled,
    Decision,
    Failed,
    Finished,
    Held,
    Scheduler,
    SchedulerEvent,
    TimerFired,
    Work,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowprefill.engine.kv_blocks import BlockPool
    from flowprefill.engine.live_request import LiveRequest
    from flowprefill.engine.worker import RunEvent, Worker
    from flowprefill.request import FinishReason
    from flowprefill.scheduling.admission import AdmissionLimits

log = logging.getLogger(__name__)

KEPT_DECISIONS = 1000
KEPT_RUN_NAMES = 8192
WAITED_S = 0.001  # who gets its KV blocks later than this after its arrival has waited for them


class EngineCore:
    """The engine behind the public class: no tokenizer, no checkpoint, only runs and requests."""

    def __init__(
        self,
        scheduler: Scheduler,
        worker: Worker,
        pool: BlockPool,
        limits: AdmissionLimits,
    ) -> None:
        """Join the parts; `start` begins."""
        self._scheduler = scheduler
        self._worker = worker
        self._pool = pool
        self._lock = InterruptibleLock()
        self._live: dict[str, LiveRequest] = {}
        self._memory = MemoryQueue(pool)
        self._gate = Gate(scheduler, self._memory, pool, limits)
        self._runs: dict[int, LiveRun] = {}
        self._scheduler_events: deque[SchedulerEvent] = deque()
        self._outbox = Outbox()
        self.has_failed = False  # for good: see _fail_all
        self._refusal = ""  # why new requests are refused; empty: they are not
        self._idle = threading.Condition(self._lock.inner)
        self._events = EventThread(
            worker, self._handle_event, self._handle_timer, self._handle_failure
        )
        self._is_stopped = False
        self._process = os.getpid()
        self._closing = InterruptibleLock()
        self.observers: list[EngineObserver] = []
        self.decisions: deque[dict[str, Any]] = deque(maxlen=KEPT_DECISIONS)
        self._stories = Stories()
        self.run_names: OrderedDict[int, str] = OrderedDict()

    # ---- called from any thread ----------------------------------------------------------------

    def start(self) -> None:
        """Start the event thread; the worker has been started."""
        self._events.start()

    def step(self) -> None:
        """Wait for events or the timer and handle them; simulators call it instead of `start`."""
        self._events.step()

    def submit(self, request: LiveRequest) -> None:
        """Admit a request and let the scheduler decide, in this thread.

        Raises:
            NotReady: the engine is closing. Overloaded: too much waits. InvalidRequest: its id is
            that of a live request. In each case nothing has changed.
        """
        self._check_outside()
        with self._lock:
            if self._refusal:
                raise NotReady(self._refusal)
            if request.id in self._live:
                raise InvalidRequest.field("id", request.id, "an id that no live request has")
            self._gate.check(self._worker.now_s(), request.request.tenant, request)
            self._gate.enter(request)
            request.considered_s = self._worker.now_s()
            self._live[request.id] = request
            self._stories.arrived(request, request.arrival_s)
            self._memory.push(request)
            self._settle()
            if not request.is_ended:  # after the dispatch, which must not wait for a prediction
                self._predict(request)
        self._deliver()

    def check_load(self, tenant: str) -> None:
        """Refuse before a prompt is tokenised what would be refused after; raises Overloaded."""
        self._check_outside()
        with self._lock:
            self._gate.check(self._worker.now_s(), tenant)

    def cancel(self, request: LiveRequest) -> None:
        """End a request early: at the next boundary if its run is executing."""
        if self._cannot(self.cancel, request):
            return
        with self._lock:
            if not request.is_ended and request.error is None and request.id in self._live:
                request.cancelled_at_s = self._worker.now_s()
                error = RequestCancelled(f"request {request.id} was cancelled")
                self._end_early(request, error, "cancelled")
                self._settle()
        self._deliver()

    def hold(self, request: LiveRequest, *, is_held: bool) -> None:
        """Keep a request out of further decode steps, or let it into them again.

        No effect once it is about to end, nor, to hold, once the engine is closing.
        """
        if self._cannot(partial(self.hold, request, is_held=is_held)):
            return
        with self._lock:
            is_live = request.id in self._live and request.error is None and not request.is_ended
            if is_live and request.is_held != is_held and not (is_held and self._refusal):
                self._hold(request, is_held=is_held)
                self._settle()
        self._deliver()

    def close(self, timeout: float | None) -> None:
        """Refuse new requests, wait for the live ones, cancel the rest, stop all threads.

        On the event thread, which is to be stopped, and inside a decision it does not wait.
        """
        if self._lock.is_inside or self._events.is_current:
            do_elsewhere(self.close, timeout)
            return
        timeout = waited_at_most(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            self._refusal = self._refusal or "the engine is shutting down"
            for request in self._live.values() if timeout != 0 else ():
                if request.is_held:  # else it would not end
                    self._hold(request, is_held=False)
            self._settle()
        self._deliver()
        with self._idle:
            while self._live:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._idle.wait(left)
            rest = list(self._live.values())
        for request in rest:
            self.cancel(request)
        self._wait_until_idle()
        if self._closing.is_inside:
            return
        with self._closing:  # one thread closes, others wait for it
            if self._is_stopped:
                return
            self._is_stopped = True
            self._events.stop()
            self._worker.stop()

    def counts(self) -> tuple[int, int, int, int]:
        """Return how many requests run or decode, wait, are suspended, and are held."""
        with self._lock:
            load = self._scheduler.load()
            # The scheduler of an engine that has failed may still count what is gone.
            waiting = min(load.waiting_jobs + len(self._memory), len(self._live))
            suspended = sum(
                len(active.requests)
                for active in self._runs.values()
                if active.work.kind == "prefill" and active.work is not self._scheduler.current
            )
            held = len(self._memory.held)
            running = max(len(self._live) - waiting - suspended - held, 0)
            return running, waiting, suspended, held

    def story(self, request_id: str) -> dict[str, Any] | None:
        """Return what happened to one of the last requests; None if it is not known."""
        with self._lock:
            return self._stories.story(request_id, self._worker.now_s())

    def recent(self, reply_id: str = "") -> list[dict[str, Any]]:
        """Return the last requests in short, the newest first; or a reply's choices."""
        with self._lock:
            return self._stories.recent(reply_id, self._worker.now_s())

    def set_max_blocking(self, seconds: float) -> None:
        """Tell the scheduler how long segments are from now on.

        Raises:
            RuntimeError: requests are live, or a run is; nothing has changed.
        """
        with self._lock:
            self._check_idle()
            self._scheduler.settings.max_blocking_s = seconds

    def set_scheduler(self, scheduler: Scheduler) -> None:
        """Have a new scheduler decide from now on.

        Raises:
            RuntimeError: requests are live, or a run is; nothing has changed.
        """
        with self._lock:
            self._check_idle()
            self._scheduler = scheduler
            self._gate.set_scheduler(scheduler)

    def _cannot(self, call: Callable[..., None], *arguments: Any) -> bool:
        """Whether a call can do nothing here; inside a decision, another thread makes it then."""
        if os.getpid() != self._process:  # a fork: the request is not there, the lock may be held
            return True
        if self._lock.is_inside:
            do_elsewhere(call, *arguments)
            return True
        return False

    def _check_outside(self) -> None:
        if self._lock.is_inside:
            raise NotReady("a signal handler or finalizer has interrupted the engine itself")

    def _check_idle(self) -> None:
        if self._live or self._runs:
            raise RuntimeError(f"{len(self._live)} requests are live, expected an idle engine")

    # ---- decisions -----------------------------------------------------------------------------

    def _admit(self) -> None:
        now = self._worker.now_s()
        for request in self._memory.admit(now):
            if now - request.arrival_s > WAITED_S:
                self._stories.note(request.id, now, "got_memory")
            if not request.tokens:
                request.cached_tokens = request.handle.cached_tokens = request.computed
            request.is_scheduled = True
            self._scheduler_events.append(Arrival(request.job()))
        self._note_evicted()

    def _settle(self) -> None:
        """Admit what fits and tell the scheduler all events, until none is left. Lock held."""
        try:
            self._tell_scheduler()
        except Exception as error:  # ours, or of a policy: no client may wait for ever
            log.exception("the engine has failed")
            self._fail_all(error)
        if not self._live:
            self._idle.notify_all()

    def _tell_scheduler(self) -> None:
        self._admit()
        while self._scheduler_events:
            event = self._scheduler_events.popleft()
            start = self._worker.now_s()
            self._gate.note(start)
            decision = self._scheduler.on_event(event, start)
            self._outbox.decisions_s.append(self._worker.now_s() - start)
            self._carry_out(decision)
            self._stories.decided(event, decision, self._scheduler.current, start)
            self.decisions.append(decision_entry(event, decision, start))
            if not self._scheduler_events:
                self._admit()

    def _predict(self, request: LiveRequest) -> None:
        try:
            predicted_s = self._gate.predicted_ttft_s(request, self._worker.now_s())
            request.handle.predicted_ttft = predicted_s
        except Exception as error:  # of a policy: the request is live, its client needs the handle
            log.exception("the engine has failed")
            self._fail_all(error)

    def _carry_out(self, decision: Decision) -> None:
        for work in decision.cancel:
            if work.id in self._runs:
                self._worker.cancel(self._runs[work.id].run)
        for job_id, reason in decision.dropped:
            request = self._live.get(job_id)
            if request is None:
                continue  # it has failed in this moment
            request.is_scheduled = False  # the scheduler has already ended its job
            self._end_early(request, DeadlinePassed(f"request {job_id}: {reason}"), "expired")
        if decision.dispatch is not None:
            self._dispatch(decision, decision.dispatch)
        self._events.set_timer(math.inf if decision.wake_at is None else decision.wake_at)

    def _dispatch(self, decision: Decision, work: Work) -> None:
        active, old = self._runs.get(work.id), decision.preempted
        victim = None if old is None else self._runs.get(old.id)
        if victim is not None:
            victim.gives_way(decision.reason, work.id)
        if active is None:
            if victim is not None:
                # It stops while the newcomer's run is built: a boundary missed costs a segment.
                self._worker.suspend(victim.run)
            active = self._start_run(work)
        if active is None:
            return
        if victim is not None:
            active.victims.add(victim.work.id)
        self._worker.dispatch(active.run)  # it may have ended in this moment: its event will tell

    def _start_run(self, work: Work) -> LiveRun | None:
        """Build the run of a work that starts; None if that failed and its requests with it."""
        requests = [self._live[job_id] for job_id in work.job_ids if job_id in self._live]
        if work.kind == "decode":
            requests = self._with_blocks(requests)
        if not requests:  # all have lost their blocks, or failed, in this moment
            self._scheduler_events.append(Failed(work.id))
            return None
        try:
            batch = self._batch_of(work.id, requests)
            run = self._worker.make_run(batch)
        except Exception as error:  # whatever it is: these requests fail, the engine goes on
            for request in requests:
                self._fail(request, RequestFailed(f"request {request.id}: {error}"))
            self._scheduler_events.append(Failed(work.id))
            return None
        for request in requests:
            request.work_id = work.id
        active = self._runs[work.id] = LiveRun(work, run, requests, batch)
        self.run_names[work.id] = active.name
        while len(self.run_names) > KEPT_RUN_NAMES:
            self.run_names.popitem(last=False)
        return active

    def _batch_of(self, run_id: int, requests: list[LiveRequest]) -> Batch:
        """Return what a run over the requests computes."""
        output = requests[0].output  # a prefill packs those of one
        chooses = output == "logits" and self._worker.limits.chooses_tokens
        return Batch(
            run_id=run_id,
            sequences=[request.next_piece(chooses_token=chooses) for request in requests],
            corrections=self._scheduler.cost_model.corrections,
            output=output,
        )

    def _with_blocks(self, requests: list[LiveRequest]) -> list[LiveRequest]:
        """Give each decoding request room for its next token; returns those that got it."""
        kept = self._memory.make_room(requests, self._live.values())
        self._note_evicted()
        return kept

    def _note_evicted(self) -> None:
        """Tell the scheduler before anything else: no decision may take those without blocks."""
        events = self._scheduler_events
        for request in self._memory.take_evicted():
            request.is_scheduled = False
            self._stories.note(request.id, self._worker.now_s(), "lost_memory")
            untold = [e for e in events if isinstance(e, Arrival) and e.job.id == request.id]
            if untold:  # it had its blocks for no longer than a decision takes
                events.remove(untold[0])
            else:
                events.appendleft(Cancelled(request.id))

    def _hold(self, request: LiveRequest, *, is_held: bool) -> None:
        request.hold(self._worker.now_s(), is_held=is_held)
        if is_held:
            self._memory.hold(request)
        else:
            self._memory.resume(request)
        self._scheduler_events.append(Held(request.id, is_held))

    # ---- ends ----------------------------------------------------------------------------------

    def _end_early(
        self, request: LiveRequest, error: FlowPrefillError, reason: FinishReason
    ) -> None:
        """End a request before its time; its blocks stay until the run that uses them has ended."""
        request.error = error
        request.finish_reason = reason
        if request.is_scheduled:
            request.is_scheduled = False
            self._scheduler_events.append(Cancelled(request.id))
        if request.work_id is None:
            self._free(request)

    def _fail(self, request: LiveRequest, error: FlowPrefillError) -> None:
        """End a request whose run is over. The scheduler learns it with the run's end."""
        if request.error is None:
            request.error, request.finish_reason = error, "failed"
        request.work_id = None
        self._free(request)

    def _free(self, request: LiveRequest) -> None:
        """The one place where a request ends: blocks freed, forgotten, result to be delivered."""
        assert not request.is_ended
        request.is_ended = True
        self._gate.leave(request)
        self._stories.ended(request, self._worker.now_s())
        self._memory.remove(request)
        if request.reservation is not None:
            self._pool.release(request.reservation)
            request.reservation = None
            self._memory.blocks_freed()
        if request.cancelled_at_s is not None:
            request.cancel_to_free_s = self._worker.now_s() - request.cancelled_at_s
        del self._live[request.id]
        self._outbox.ended.append(request)

    def _deliver(self) -> None:
        """Hand over what has ended and tell the observers. No lock held."""
        with self._lock:
            outbox, self._outbox = self._outbox, Outbox()
        outbox.deliver(self.observers, self._worker.now_s())

    def _wait_until_idle(self) -> None:
        with self._idle:
            while self._live or self._runs:
                self._idle.wait()  # whatever empties one of them settles afterwards

    # ---- the event thread ----------------------------------------------------------------------

    def _handle_event(self, event: RunEvent) -> None:
        if event.kind == "suspended":
            return
        run_id = event.run.id
        try:
            self._handle_end_of_run(run_id, event.kind)
        except Exception as error:  # a bug of ours; its event will not come again
            log.exception("the end of run %d could not be handled", run_id)
            self._runs.pop(run_id, None)
            self._handle_failure(error)

    def _handle_timer(self) -> None:
        with self._lock:
            self._scheduler_events.append(TimerFired())
            self._settle()
        self._deliver()

    def _handle_failure(self, error: Exception) -> None:
        with self._lock:
            self._fail_all(error)
            self._settle()
        self._deliver()

    def _handle_end_of_run(self, run_id: int, kind: str) -> None:
        """Handle the end of a run, so that the device idles least and first tokens wait least.

        A first token is handed over at once; those of a decode step once the next run is
        dispatched: each wakes a client's thread, which then competes for the interpreter.
        """
        active = self._runs[run_id]
        failures: dict[str, FlowPrefillError] = {}
        if kind == "finished":
            failures = active.answer(self._worker, self._worker.now_s())
            if active.work.kind == "prefill":
                wake(active.hand_over())
        with self._lock:
            self._outbox.preemptions += active.preemptions(self._runs)
            del self._runs[run_id]
            active.account()
            if kind == "failed":
                for request in active.requests:
                    message = f"request {request.id}: {active.run.error}"
                    self._fail(request, RequestFailed(message))
                self._scheduler_events.append(Failed(run_id))
            else:
                ends = self._release_requests(active, failures, is_finished=kind == "finished")
                executed_s = active.run.accounting().running_s
                if kind == "finished":
                    self._scheduler_events.append(Finished(run_id, ends, executed_s))
                    self._note_held(active)
            self._settle()
            wakers = active.hand_over()
        wake(wakers)
        self._deliver()
        for request in active.requests:  # the next run executes already
            request.prepare_sampling()
        if kind == "finished":
            self._learn(active)

    def _learn(self, active: LiveRun) -> None:
        """Correct the rates by what the run's segments took."""
        cost_model = self._scheduler.cost_model
        if not cost_model.learns_from(active.work.kind):
            return
        times = self._worker.operator_times(active.run)
        if times:
            with self._lock:
                cost_model.observe_operators(times)

    def _note_held(self, active: LiveRun) -> None:
        """Note that held requests of a finished run are at rest, and decode if it was a prefill."""
        for request in active.requests:
            if request.is_held and not request.is_ended:
                self._memory.blocks_freed()
                if active.work.kind == "prefill":
                    self._scheduler_events.append(Held(request.id, True))

    def _fail_all(self, error: Exception) -> None:
        """End every request and refuse new ones: what scheduler and engine know may not agree."""
        self.has_failed = True
        self._refusal = f"the engine has failed: {error}"
        self._scheduler_events.clear()
        for active in self._runs.values():
            self._worker.cancel(active.run)
        for request in tuple(self._live.values()):
            request.is_scheduled = False
            if request.error is None:
                message = f"request {request.id}: internal error: {error}"
                request.error, request.finish_reason = RequestFailed(message), "failed"
            if request.work_id not in self._runs:
                self._free(request)

    def _release_requests(
        self, active: LiveRun, failures: dict[str, FlowPrefillError], *, is_finished: bool
    ) -> frozenset[str]:
        """Give a run's requests back; returns the ids of those that have ended with it."""
        ends: set[str] = set()
        for request, computed in zip(active.requests, active.computed, strict=True):
            assert request.reservation is not None
            request.work_id = None
            if request.id in failures:
                blocks = request.reservation.block_ids[request.reservation.committed_blocks :]
                self._worker.zero_blocks(blocks)
                if request.error is None:
                    request.error, request.finish_reason = failures[request.id], "failed"
            elif is_finished:
                request.computed = computed
                self._gate.leave(request)
                self._pool.commit(request.reservation, request.ids, computed)
                request.end_with_last_token()
            if request.finish_reason is not None:
                if request.is_scheduled:
                    ends.add(request.id)
                self._free(request)
        return frozenset(ends)
