"""Node: one worker in virtual time: a scheduler, a device, and the requests that live there.

Does what EngineCore does with a scheduler's decisions, and nothing else: no tokens, no memory, no
threads. Its caller gives it arrivals and calls `step` at `next_s`.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from flowprefill.scheduling import Arrival, Decision, Finished, Job, TimerFired
from flowprefill.scheduling.cost_model import attention_pairs
from flowprefill.simulation.device import VirtualDevice, VirtualRun
from flowprefill.simulation.result import Outcome

if TYPE_CHECKING:
    from flowprefill.request import OnMiss
    from flowprefill.scheduling import Scheduler, SchedulerEvent, Work
    from flowprefill.simulation.costs import WorkCosts
    from flowprefill.traces import TraceRequest

Role = Literal["prefill", "decode", "mixed"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed")


class LiveJob:
    """A request that has not ended: its outcome so far, and how much slower than said it is."""

    __slots__ = ("first_s", "noise", "outcome", "tokens", "tokens_left")

    def __init__(self, outcome: Outcome, tokens_left: int, noise: float) -> None:
        self.outcome = outcome
        self.tokens_left = tokens_left
        self.noise = noise
        self.first_s = math.inf
        self.tokens = 0


class Node:
    """See the file's head.

    Attributes:
        next_s: when the device or the scheduler's timer is due; inf: never.
        events: how many events the scheduler was told.
        tokens: prompt tokens of the requests that live here.
        decisions: the last decisions; None: they are not kept.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        costs: WorkCosts,
        on_end: Callable[[Outcome], None],
        *,
        role: Role = "mixed",
        on_miss: OnMiss = "demote",
        worker: int = 0,
        seed: int = 0,
        noise: float = 0.0,
        on_blocking: Callable[[float], None] | None = None,
    ) -> None:
        """Join the parts; see `simulate` for what the options mean."""
        self.scheduler = scheduler
        self.device = VirtualDevice(costs.profile.segments_in_flight, on_blocking)
        self.next_s = math.inf
        self.events = 0
        self.tokens = 0
        self.decisions: deque[tuple[float, SchedulerEvent, Decision]] | None = None
        self._costs = costs
        self._response_s = costs.profile.response_s
        self._on_end = on_end
        self._role = role
        self._on_miss = on_miss
        self._worker = worker
        self._noise = noise
        self._random = random.Random(seed)
        self._live: dict[str, LiveJob] = {}
        self._runs: dict[int, tuple[VirtualRun, Work]] = {}
        self._timer_s = math.inf

    def job_of(self, number: int, request: TraceRequest) -> Job:
        """Return the scheduler's view of a request that arrives."""
        is_decode = self._role == "decode"
        return Job(
            id=str(number),
            arrival_s=request.at_s,
            prompt_tokens=0 if is_decode else request.prompt_tokens,
            context_tokens=request.prompt_tokens if is_decode else 0,
            ttft_deadline_s=request.at_s + request.ttft_s,
            tpot_s=request.tpot_s,
            on_miss=self._on_miss,
            service_class=request.service_class,
            decodes=request.output_tokens > 1,
        )

    def arrive(self, number: int, request: TraceRequest, job: Job, noise: float = 1.0) -> None:
        """Take a request in at its arrival.

        Args:
            noise: true over predicted time of its prefill.
        """
        outcome = Outcome(request, number, worker=self._worker)
        tokens = 1 if self._role == "prefill" else request.output_tokens
        live = LiveJob(outcome, tokens, noise)
        if self._role == "decode":  # its first token came with it
            outcome.ttft_s, live.first_s, live.tokens = 0.0, request.at_s, 1
            live.tokens_left -= 1
            if not live.tokens_left:
                self._end(outcome, request.at_s)
                return
        self._live[job.id] = live
        self.tokens += request.prompt_tokens
        self._tell(Arrival(job), request.at_s)

    def step(self) -> None:
        """Let happen what is due at `next_s`: the device first, then the scheduler's timer."""
        device, now = self.device, self.next_s
        if device.next_s > self._timer_s:
            self._timer_s = math.inf
            self._tell(TimerFired(), now)
            return
        event = device.advance(now)
        if event is not None and event.kind == "finished":
            self._finish(event.run, now)
        else:
            if event is not None and event.kind == "cancelled":
                del self._runs[event.run.id]
            self.next_s = min(device.next_s, self._timer_s)

    # -- the engine's part -------------------------------------------------------------------

    def _tell(self, event: SchedulerEvent, now: float) -> None:
        decision = self.scheduler.on_event(event, now)
        self.events += 1
        if self.decisions is not None:
            self.decisions.append((now, event, decision))
        for work in decision.cancel:
            run, _ = self._runs[work.id]
            is_executing = run is self.device.current
            if self.device.cancel(run, now) and not is_executing:
                del self._runs[work.id]
        for job_id, _ in decision.dropped:
            outcome = self._live.pop(job_id).outcome
            outcome.end = "dropped"
            self.tokens -= outcome.request.prompt_tokens
            self._end(outcome, now)
        work_now = decision.dispatch
        if work_now is not None:
            entry = self._runs.get(work_now.id)
            run = self._make_run(work_now) if entry is None else entry[0]
            self.device.dispatch(run, now)
        self._timer_s = math.inf if decision.wake_at is None else decision.wake_at
        self.next_s = min(self.device.next_s, self._timer_s)

    def _make_run(self, work: Work) -> VirtualRun:
        costs = self._costs
        jobs = work.jobs
        if work.is_decode:
            context = sum(
                live.outcome.request.prompt_tokens + live.tokens
                for live in (self._live[job.id] for job in jobs)
            )
            rows, pairs = len(jobs), float(context)
            total = costs.decode_s(rows, context) * self._step_noise()
        else:
            rows, pairs, slower = 0, 0.0, 0.0
            for job in jobs:
                rows += job.prompt_tokens
                pairs += attention_pairs(job.prompt_tokens, job.context_tokens)
                slower += job.prompt_tokens * self._live[job.id].noise
            total = costs.prefill_s(rows, pairs) * slower / rows
        run = VirtualRun(work.id, total, lambda: costs.bounds(rows, pairs))
        self._runs[work.id] = (run, work)
        return run

    def _step_noise(self) -> float:
        if not self._noise:
            return 1.0
        return math.exp(self._random.gauss(0.0, self._noise) - self._noise**2 / 2)

    def _finish(self, run: VirtualRun, now: float) -> None:
        _, work = self._runs.pop(run.id)
        ends = set()
        for job in work.jobs:
            live = self._live[job.id]
            live.tokens_left -= 1
            live.tokens += 1
            outcome = live.outcome
            if live.first_s == math.inf:
                live.first_s = now
                outcome.ttft_s = now - outcome.request.at_s + self._response_s
                outcome.preemptions = run.preemptions
                outcome.suspended_s = run.suspended_s
                outcome.blocking_s = run.blocking_s
            if not live.tokens_left:
                ends.add(job.id)
                del self._live[job.id]
                self.tokens -= outcome.request.prompt_tokens
                if live.tokens > 1:
                    outcome.mean_itl_s = (now - live.first_s) / (live.tokens - 1)
                self._end(outcome, now)
        self._tell(Finished(run.id, frozenset(ends), run.executed_s), now)

    def _end(self, outcome: Outcome, now: float) -> None:
        outcome.finished_s = now
        self._on_end(outcome)
