"""Scheduler: decides what runs next; engine, simulator and tests give it events and carry it out.

Long because it is one state machine: every method changes the same few queues. Pure: no clock,
thread, tensor or I/O. One call at a time (the engine holds its lock). Each event costs O(log n)
steps in the number of waiting jobs, plus O(k log k) in the size k of a batch or step.
"""

from __future__ import annotations

import heapq
import math
from copy import copy
from itertools import count, islice
from typing import TYPE_CHECKING

from flowprefill.scheduling.cost_model import RunShape, attention_pairs
from flowprefill.scheduling.decoding import Decoding
from flowprefill.scheduling.interface import (
    Arrival,
    Cancelled,
    Decision,
    Failed,
    Finished,
    Held,
    Load,
    SchedulerSettings,
)
from flowprefill.scheduling.outlook import Outlook, Surroundings, outlook_of
from flowprefill.scheduling.policies import make_policy
from flowprefill.scheduling.ready_queue import ReadyQueue
from flowprefill.scheduling.reasons import Reason
from flowprefill.scheduling.work import Verdict, Work

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flowprefill.scheduling.cost_model import CostModel
    from flowprefill.scheduling.interface import SchedulerEvent
    from flowprefill.scheduling.job import Job
    from flowprefill.scheduling.policies import Policy

LOOKAHEAD = 16  # waiting entries a policy weighs when it picks or preempts
BATCH_SCAN = 64  # waiting entries it looks through when it packs
TTFT_SCAN = 256  # waiting entries a predicted TTFT looks through
MIN_WAKE_S = 1e-3
# What an outlook keeps free before a deadline: preemptions, each at the end of a segment.
MARGIN_SEGMENTS, MOST_MARGIN = 2, 0.1  # at most this share of the objective
MOST_SPREAD = 0.25  # and for errors of prediction at most this share


class Scheduler:
    """Decides for one device what runs, what is suspended, packed, dropped."""

    def __init__(
        self,
        policy: str | Policy,
        cost_model: CostModel,
        settings: SchedulerSettings | None = None,
    ) -> None:
        """Make a scheduler.

        Args:
            policy: a name from the configuration, or an object that answers `Policy`'s questions.
            cost_model: predicts; the scheduler also tells it how long finished works took.
        """
        self.settings = settings if settings is not None else SchedulerSettings()
        self.cost_model = cost_model
        self.policy = (
            make_policy(policy, cost_model, self.settings) if isinstance(policy, str) else policy
        )
        self._queue = ReadyQueue(self.policy)
        self._decoding = Decoding(cost_model, self.settings)
        self._current: Work | None = None
        self._jobs: dict[str, Job] = {}
        self._prefills: dict[str, Work] = {}  # job id -> where its prefill waits, runs, stands
        self._works: dict[int, Work] = {}
        self._hopeless: list[tuple[float, int, Job]] = []  # on_miss="drop": when to look again
        self._serials = count()
        self._work_ids = count(1)
        self._now = -math.inf
        self._waiting_tokens = 0
        self._waiting_jobs = 0
        self._cancelled_works: list[Work] = []
        self._dropped: list[tuple[str, str]] = []

    def on_event(self, event: SchedulerEvent, now: float) -> Decision:
        """Take note of an event and decide.

        Args:
            now: seconds on the clock of all deadlines. An earlier time than the last event's is
                taken as the last event's.

        Raises:
            ValueError: the job that arrives has the id of a live one; nothing is changed.
        """
        if isinstance(event, Arrival) and event.job.id in self._jobs:
            raise ValueError(f"job {event.job.id}: a job with this id is live")
        now = self._now = max(now, self._now)
        self._cancelled_works, self._dropped = [], []
        if self._current is not None:
            self._current.account_run(now)
        self._apply(event, now)
        self._drop_hopeless(now)
        self._queue.review(now)
        return self._decide(now)

    @property
    def current(self) -> Work | None:
        """The work that runs, as far as the scheduler knows."""
        return self._current

    def load(self, now: float | None = None) -> Load:
        """Return what waits; the running prefill has what is left of it now, or at the last event.

        Between two events it may run for minutes.
        """
        running, prefilling_s = self._current, 0.0
        if running is not None and not running.is_decode:
            prefilling_s = running.remaining_s if now is None else running.left_s(now)
        return Load(
            waiting_jobs=self._waiting_jobs,
            waiting_tokens=self._waiting_tokens,
            backlog_s=self._queue.total_s + prefilling_s,
            suspended_works=len(self._works) - (running is not None),
            decoding=len(self._decoding) - self._decoding.held,
            held=self._decoding.held,
        )

    def begun(self, now: float) -> Iterator[tuple[Work, float]]:
        """Yield the prefills that run or are suspended, each with the share that is left of it."""
        for work in self._works.values():
            if not work.is_decode:
                left_s = work.left_s(now) if work is self._current else work.remaining_s
                yield work, min(left_s / work.predicted_s, 1.0)

    def decode_share(self) -> float:
        """Return the share of the time that decode steps take while prefills wait, as predicted."""
        return self._decoding.share()

    def predicted_ttft_s(self, job: Job, now: float, *, may_preempt: bool = True) -> float:
        """Return the time from now to the job's first token; changes nothing.

        The job may have arrived already; if not, the answer is for its arrival now. Counts what is
        ahead of it in the policy's order and, unless it would preempt, the current work; not
        decode steps in between. A lower bound when more than 256 wait ahead.

        Args:
            may_preempt: false for one that waits for memory, which the current work holds.
        """
        own, current = self._prefills.get(job.id), self._current
        if own is not None and own is current:
            return own.left_s(now)
        work = own
        if work is None:
            work = self._new_work(job, -1)
            work.rank = self.policy.rank(work, now)
            self.policy.left(work)
        asked = copy(work)
        asked.serial = -1  # the policy is only asked
        end_s = 0.0
        if current is not None:
            preempts = may_preempt and self.policy.should_preempt(current, [asked], now).preempt
            end_s = 0.0 if preempts else current.left_s(now)
        mine = (work.rank.key, work.priority)
        works = list(islice(self._queue.in_order(), TTFT_SCAN))
        if work not in works:
            place = (i for i, o in enumerate(works) if mine < (o.rank.key, o.priority))
            works.insert(next(place, len(works)), work)
        for other in self.policy.course(works, now + end_s):
            end_s += other.remaining_s
            if other is work:
                break
        return end_s

    def outlook(self, job: Job, now: float, stretch: float, elsewhere_s: float = 0.0) -> Outlook:
        """Return what would become of a job that arrived now, and of the others; decides nothing.

        Args:
            stretch: how many times longer works take because of decode steps in between.
            elsewhere_s: predicted time of prefills that the scheduler does not know of yet.
        """
        if self._current is not None:
            self._current.account_run(now)  # as its next event would, for the policy to look at
        work, queue = self._new_work(job, -1), self._queue
        objective_s = max(job.ttft_deadline_s - job.arrival_s, 0.0)
        margin_s = min(MARGIN_SEGMENTS * self.settings.max_blocking_s, MOST_MARGIN * objective_s)
        late_quantile = self.cost_model.error_quantile("prefill", 0.9)
        around = Surroundings(
            stretch,
            margin_s,
            spread=late_quantile - 1.0 if late_quantile > 1.0 else 0.0,  # NaN: nothing was seen
            most_spread_s=MOST_SPREAD * objective_s,
            elsewhere_s=elsewhere_s,
        )
        return outlook_of(
            work,
            self._current,
            queue.in_order(),
            queue.total_s,
            self.policy,
            now,
            around,
        )

    # -- events ------------------------------------------------------------------------------

    def _apply(self, event: SchedulerEvent, now: float) -> None:
        match event:
            case Arrival(job):
                self._arrive(job, now)
            case Finished(work_id, ends, executed_s):
                self._finish(work_id, ends, executed_s, now)
            case Failed(work_id):
                work = self._works.get(work_id)
                if work is not None:
                    for job in tuple(work.jobs):
                        self._end_job(job.id, now)
                    self._cancelled_works.clear()  # it has ended, there is nothing to stop
            case Cancelled(job_id):
                self._end_job(job_id, now)
            case Held(job_id, is_held):
                self._decoding.hold(job_id, is_held=is_held, now=now)
            case _:
                pass  # TimerFired: time has passed, that is all

    def _arrive(self, job: Job, now: float) -> None:
        self._jobs[job.id] = job
        if job.prompt_tokens == 0:
            self._decoding.add(job, job.context_tokens, now)
            return
        work = self._new_work(job, next(self._serials))
        self._prefills[job.id] = work
        self._decoding.expect(job, 1)
        self._count_waiting(work, 1)
        self._queue.push(work, now)
        if job.on_miss == "drop" and job.ttft_deadline_s < math.inf:
            self._watch(job, self._hopeless_at(job, work))

    def _finish(
        self, work_id: int, ends: frozenset[str], executed_s: float | None, now: float
    ) -> None:
        work = self._works.get(work_id)
        if work is None:
            return
        if executed_s is None and work.suspensions == 0:
            executed_s = work.executed_s
        if executed_s is not None:
            self.cost_model.observe(work.kind, work.predicted_s, executed_s, work.shape)
        self._release(work)
        if work.is_decode:
            for job in self._decoding.end_step(now, ends):
                del self._jobs[job.id]
            return
        for job in work.jobs:
            del self._prefills[job.id]
            self._decoding.expect(job, -1)
            if job.id in ends:
                del self._jobs[job.id]
            else:
                self._decoding.add(job, job.context_tokens + job.prompt_tokens, now)

    def _end_job(self, job_id: str, now: float) -> None:
        """End a job wherever it is; a work without live jobs is given up."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        work = self._prefills.pop(job_id, None)
        if work is not None:
            self._decoding.expect(job, -1)
        else:
            step = self._decoding.step
            self._decoding.discard(job)
            if step is None or job not in step.jobs:
                return
            work = step
        if not work.is_started:
            work.has_ended = True
            self._queue.remove(work)
            self._count_waiting(work, -1)
            return
        work.discard(job)
        if work.jobs:
            if work.is_decode:
                self._decoding.set_step_due()
            if work in self._queue:  # its deadline may be another now
                self._queue.remove(work)
                self._queue.push(work, now)
            return
        self._cancelled_works.append(work)
        self._release(work)
        if work.is_decode:
            self._decoding.drop_step(now)

    def _drop_hopeless(self, now: float) -> None:
        while self._next_hopeless_s() <= now:
            _, _, job = heapq.heappop(self._hopeless)
            at = self._hopeless_at(job, self._prefills[job.id])
            if at > now:
                self._watch(job, at)
            else:
                self._dropped.append((job.id, str(Reason.OUT_OF_REACH)))
                self._end_job(job.id, now)

    # -- decisions ---------------------------------------------------------------------------

    def _decide(self, now: float) -> Decision:
        current = self._current
        if current is None:
            verdict = self._choose(now)
        else:
            verdict = self._challenge(current, now)
            if not verdict.preempt:
                return self._decision(verdict.reason, verdict.again_at)
        if not verdict.preempt:
            return self._decision(Reason.NOTHING_TO_RUN, math.inf)
        if current is not None:  # first: what is packed must not make it late
            if verdict.by is current:
                raise ValueError(f"policy {self.policy.name!r}: it names a work that does not wait")
            self._suspend(current, now, for_prefill=verdict.by is not None)
        work = self._take(verdict.by, now)
        is_resume = self._dispatch(work, now)
        after = self._challenge(work, now)
        again_at = now + MIN_WAKE_S if after.preempt else after.again_at
        return self._decision(verdict.reason, again_at, work, is_resume, current)

    def _choose(self, now: float) -> Verdict:
        """Decide for an idle device: `by` is the prefill to run, None a decode step."""
        waiting = self._queue.first(LOOKAHEAD)
        prefill = self.policy.pick(waiting, now) if waiting else None
        decode = self._decoding.goes_first(prefill, now, waiting)
        if decode.preempt or prefill is None:
            return decode
        return Verdict(True, Reason.DEVICE_IS_FREE, by=prefill)

    def _challenge(self, current: Work, now: float) -> Verdict:
        """Decide whether the current work is suspended, and for what."""
        again_at, waiting = math.inf, self._queue.first(LOOKAHEAD)
        if not current.is_decode and self.policy.decode_preempts:
            decode = self._decoding.goes_first(current, now, waiting)
            if decode.preempt:
                return decode
            again_at = decode.again_at
        if not waiting:
            return Verdict(False, Reason.NOTHING_ELSE, again_at)
        verdict = self.policy.should_preempt(current, waiting, now)
        by = verdict.by if verdict.by is not None else waiting[0]
        return Verdict(verdict.preempt, verdict.reason, min(verdict.again_at, again_at), by)

    def _take(self, prefill: Work | None, now: float) -> Work:
        """Take what is to run out of the queue, packed with others, or the decode step."""
        if prefill is None:
            step = self._decoding.step
            if step is None:
                step = self._decoding.take_step(next(self._serials), now)
                self._start(step)
            return step
        if prefill.is_started:
            self._queue.remove(prefill)
            return prefill
        output = prefill.jobs[0].output
        waiting = islice(self._queue.in_order(), BATCH_SCAN)
        alike = (work for work in waiting if work.jobs[0].output == output)
        members = self.policy.batch(prefill, alike, now)
        if prefill not in members or any(member.is_started for member in members):
            raise ValueError(
                f"policy {self.policy.name!r}: batch: expected its head and others not started"
            )
        for member in members:
            self._queue.remove(member)
            self._count_waiting(member, -1)
        work = prefill if len(members) == 1 else self._merge(prefill, members)
        self._start(work)
        return work

    def _merge(self, head: Work, members: list[Work]) -> Work:
        jobs = [member.jobs[0] for member in members]
        merged = self._prefill_of(jobs, head.serial)
        since = [member.late_since_s for member in members if member.late_since_s is not None]
        merged.late_since_s = min(since, default=None)
        protected = [job for member in members for job in member.protected]
        merged.protected = sorted(protected, key=lambda job: job.ttft_deadline_s)
        merged.fair_arrival_s = min(member.fair_arrival_s for member in members)
        merged.deadline_s = min(member.deadline_s for member in members)
        merged.renewals = max(member.renewals for member in members)
        for member in members:
            member.has_ended = True
        self._prefills.update((job.id, merged) for job in jobs)
        return merged

    def _suspend(self, work: Work, now: float, *, for_prefill: bool) -> None:
        work.suspensions += 1
        work.prefill_suspensions += for_prefill
        work.is_suspended = True
        work.since_s = now
        if not work.is_decode:
            self._queue.push(work, now)

    def _dispatch(self, work: Work, now: float) -> bool:
        """Make an work current; returns whether it was suspended."""
        is_resume = work.is_suspended
        if is_resume:
            work.suspended_s += now - work.since_s
        work.is_suspended = False
        work.since_s = now
        work.stretch_s = 0.0
        self._current = work
        return is_resume

    def _decision(
        self,
        reason: str,
        again_at: float,
        dispatch: Work | None = None,
        is_resume: bool = False,
        preempted: Work | None = None,
    ) -> Decision:
        wake_at = min(again_at, self._next_hopeless_s())
        return Decision(
            cancel=tuple(self._cancelled_works),
            dropped=tuple(self._dropped),
            dispatch=dispatch,
            is_resume=is_resume,
            preempted=preempted,
            wake_at=wake_at if wake_at < math.inf else None,
            reason=str(reason),  # plain text, for users to print
        )

    # -- bookkeeping -------------------------------------------------------------------------

    def _new_work(self, job: Job, serial: int) -> Work:
        return self._prefill_of([job], serial)

    def _prefill_of(self, jobs: list[Job], serial: int) -> Work:
        shape = RunShape(
            sum(job.prompt_tokens for job in jobs),
            sum(attention_pairs(job.prompt_tokens, job.context_tokens) for job in jobs),
            sum(job.head_rows for job in jobs),
        )
        seconds = self.cost_model.packed_prefill_s(*shape)
        nominal_s = self.cost_model.nominal_s(shape)
        return Work(jobs, serial, seconds, nominal_s=nominal_s, shape=shape)

    def _start(self, work: Work) -> None:
        work.id = next(self._work_ids)
        self._works[work.id] = work

    def _release(self, work: Work) -> None:
        """Forget a work that has ended, running or suspended."""
        work.has_ended = True
        del self._works[work.id]
        if work is self._current:
            self._current = None
        if work in self._queue:
            self._queue.remove(work)
        else:
            self.policy.left(work)

    def _count_waiting(self, work: Work, sign: int) -> None:
        self._waiting_jobs += sign
        self._waiting_tokens += sign * work.prompt_tokens

    def _watch(self, job: Job, at: float) -> None:
        later = max(at, math.nextafter(self._now, math.inf))
        heapq.heappush(self._hopeless, (later, next(self._serials), job))

    def _next_hopeless_s(self) -> float:
        """Return when to look at the next job that may be dropped; inf if there is none."""
        while self._hopeless:
            at, _, job = self._hopeless[0]
            if self._jobs.get(job.id) is job and job.id in self._prefills:
                return at
            heapq.heappop(self._hopeless)
        return math.inf

    def _hopeless_at(self, job: Job, work: Work) -> float:
        """Return from when on the deadline is out of reach: by the most optimistic prediction."""
        if work is self._current or work.shape is None:
            return job.ttft_deadline_s
        # It was predicted when it came; more may be known of the machine by now.
        whole_s = min(work.predicted_s, self.cost_model.packed_prefill_s(*work.shape))
        left_s = whole_s * work.remaining_s / work.predicted_s
        return job.ttft_deadline_s - self.cost_model.optimistic_prefill_s(left_s)
