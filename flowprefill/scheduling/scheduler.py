"""Scheduler: decides what runs next; engine, simulator and tests give it events and carry it out.

Long because it is one state machine: every method changes the same few queues. Pure: no clock,
thread, tensor or I/O. One call at a time (the engine holds its lock). Each event
costs O(log n) in the number of waiting jobs, plus O(k log k) in the size k of a batch or step.
"""

from __future__ import annotations

import heapq
import math
from itertools import count, islice
from typing import TYPE_CHECKING

from flowprefill.scheduling.decoding import Decoding
from flowprefill.scheduling.entry import Entry, Verdict
from flowprefill.scheduling.interface import (
    Arrival,
    Cancelled,
    Decision,
    Failed,
    Finished,
    Load,
    Progress,
    SchedulerSettings,
    Work,
)
from flowprefill.scheduling.policies import make_policy
from flowprefill.scheduling.ready_queue import ReadyQueue

if TYPE_CHECKING:
    from flowprefill.scheduling.cost_model import CostModel
    from flowprefill.scheduling.interface import Event, Job, Threshold, WorkKind
    from flowprefill.scheduling.policies import Policy

LOOKAHEAD = 16  # waiting entries a policy weighs when it picks or preempts
BATCH_SCAN = 64  # waiting entries it looks through when it packs
TTFT_SCAN = 256  # waiting entries a predicted TTFT counts one by one
MIN_WAKE_S = 1e-3


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
        self._current: Entry | None = None
        self._jobs: dict[str, Job] = {}
        self._prefills: dict[str, Entry] = {}  # job id -> where its prefill waits, runs, stands
        self._works: dict[int, Entry] = {}
        self._hopeless: list[tuple[float, int, Job]] = []  # on_miss="drop": when to look again
        self._serials = count()
        self._work_ids = count(1)
        self._now = -math.inf
        self._waiting_tokens = 0
        self._waiting_jobs = 0
        self._cancelled_works: list[Work] = []
        self._dropped: list[tuple[str, str]] = []

    def on_event(self, event: Event, now: float) -> Decision:
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
        return self._current.work if self._current is not None else None

    def threshold(self) -> Threshold | None:
        """Return the rule by which arriving jobs preempt; None if it cannot be stated yet.

        Holds from the last event to the next.
        """
        current = self._current
        if current is None or current.is_decode:
            return None
        return self.policy.threshold(current, self._queue.head(), self._now)

    def load(self) -> Load:
        """Return what waits, as of the last event."""
        running = self._current
        prefilling_s = running.remaining_s if running is not None and not running.is_decode else 0.0
        return Load(
            waiting_jobs=self._waiting_jobs,
            waiting_tokens=self._waiting_tokens,
            backlog_s=self._queue.total_s + prefilling_s,
            suspended_works=len(self._works) - (running is not None),
            decoding=len(self._decoding),
        )

    def predicted_ttft_s(self, job: Job, now: float) -> float:
        """Return the time from now to the job's first token; changes nothing.

        The job may have arrived already; if not, the answer is for its arrival now. Counts what is
        ahead of it in the policy's order and, unless it would preempt, the current work; not
        decode steps in between. A lower bound when more than 256 wait ahead.
        """
        own, current = self._prefills.get(job.id), self._current
        if own is not None and own is current:
            return max(own.remaining_s - max(now - own.since_s, 0.0), 0.0)
        entry = self._new_entry(job, -1)
        entry.rank = self.policy.rank(entry, now)
        self.policy.left(entry)
        mine = (entry.rank.key, entry.priority)
        ahead_s = 0.0
        for other in islice(self._queue.in_order(), TTFT_SCAN):
            if mine < (other.rank.key, other.priority):
                break
            if other is own:
                continue
            ahead_s += other.remaining_s
        if current is not None and not self.policy.should_preempt(current, [entry], now).preempt:
            ahead_s += max(current.remaining_s - max(now - current.since_s, 0.0), 0.0)
        return ahead_s + entry.remaining_s

    # -- events ------------------------------------------------------------------------------

    def _apply(self, event: Event, now: float) -> None:
        match event:
            case Arrival(job):
                self._arrive(job, now)
            case Finished(work_id, ends, executed_s):
                self._finish(work_id, ends, executed_s, now)
            case Failed(work_id):
                entry = self._works.get(work_id)
                if entry is not None:
                    for job in tuple(entry.jobs):
                        self._end_job(job.id, now)
                    self._cancelled_works.clear()  # it has ended, there is nothing to stop
            case Cancelled(job_id):
                self._end_job(job_id, now)
            case Progress(work_id, remaining_s):
                self._correct(work_id, max(remaining_s, 0.0), now)
            case _:
                pass  # TimerFired: time has passed, that is all

    def _arrive(self, job: Job, now: float) -> None:
        self._jobs[job.id] = job
        if job.prompt_tokens == 0:
            self._decoding.add(job, job.context_tokens, now)
            return
        entry = self._new_entry(job, next(self._serials))
        self._prefills[job.id] = entry
        self._count_waiting(entry, 1)
        self._queue.push(entry, now)
        if job.on_miss == "drop" and job.ttft_deadline_s < math.inf:
            self._watch(job, self._hopeless_at(job, entry))

    def _finish(
        self, work_id: int, ends: frozenset[str], executed_s: float | None, now: float
    ) -> None:
        entry = self._works.get(work_id)
        if entry is None or entry.work is None:
            return
        if executed_s is None and entry.work.suspensions == 0:
            executed_s = entry.executed_s
        if executed_s is not None:
            self.cost_model.observe(entry.work.kind, entry.work.predicted_s, executed_s)
        self._release(entry)
        if entry.is_decode:
            for job in self._decoding.end_step(now, ends):
                del self._jobs[job.id]
            return
        for job in entry.jobs:
            del self._prefills[job.id]
            if job.id in ends:
                del self._jobs[job.id]
            else:
                self._decoding.add(job, job.context_tokens + job.prompt_tokens, now)

    def _end_job(self, job_id: str, now: float) -> None:
        """End a job wherever it is; a work without live jobs is given up."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        entry = self._prefills.pop(job_id, None)
        if entry is None:
            step = self._decoding.step
            self._decoding.discard(job)
            if step is None or job not in step.jobs:
                return
            entry = step
        if not entry.is_started:
            entry.has_ended = True
            self._queue.remove(entry)
            self._count_waiting(entry, -1)
            return
        entry.discard(job)
        if entry.jobs:
            if entry in self._queue:  # its deadline may be another now
                self._queue.remove(entry)
                self._queue.push(entry, now)
            return
        assert entry.work is not None
        self._cancelled_works.append(entry.work)
        self._release(entry)
        if entry.is_decode:
            self._decoding.drop_step(now)

    def _correct(self, work_id: int, remaining_s: float, now: float) -> None:
        entry = self._works.get(work_id)
        if entry is None:
            return
        is_queued = entry in self._queue
        if is_queued:
            self._queue.remove(entry)
        entry.remaining_s = remaining_s
        if is_queued:
            self._queue.push(entry, now)

    def _drop_hopeless(self, now: float) -> None:
        while self._next_hopeless_s() <= now:
            _, _, job = heapq.heappop(self._hopeless)
            at = self._hopeless_at(job, self._prefills[job.id])
            if at > now:
                self._watch(job, at)
            else:
                self._dropped.append((job.id, "its time to first token can no longer be met"))
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
            return self._decision("nothing to run", math.inf)
        entry = self._take(verdict.by, now)
        if current is not None:
            self._suspend(current, now, yields=verdict.by is not None)
        is_resume = self._dispatch(entry, now)
        after = self._challenge(entry, now)
        again_at = now + MIN_WAKE_S if after.preempt else after.again_at
        return self._decision(verdict.reason, again_at, entry.work, is_resume, current)

    def _choose(self, now: float) -> Verdict:
        """Decide for an idle device: `by` is the prefill to run, None a decode step."""
        waiting = self._queue.first(LOOKAHEAD)
        prefill = self.policy.pick(waiting, now) if waiting else None
        decode = self._decoding.goes_first(prefill, now)
        if decode.preempt or prefill is None:
            return decode
        return Verdict(True, "the device is free", by=prefill)

    def _challenge(self, current: Entry, now: float) -> Verdict:
        """Decide whether the current work is suspended, and for what."""
        again_at = math.inf
        if not current.is_decode and self.policy.decode_preempts:
            decode = self._decoding.goes_first(current, now)
            if decode.preempt:
                return decode
            again_at = decode.again_at
        if not self._queue:
            return Verdict(False, "nothing else to prefill", again_at)
        waiting = self._queue.first(LOOKAHEAD)
        verdict = self.policy.should_preempt(current, waiting, now)
        by = verdict.by if verdict.by is not None else waiting[0]
        return Verdict(verdict.preempt, verdict.reason, min(verdict.again_at, again_at), by)

    def _take(self, prefill: Entry | None, now: float) -> Entry:
        """Take what is to run out of the queue, packed with others, or the decode step."""
        if prefill is None:
            step = self._decoding.step
            if step is None:
                step = self._decoding.take_step(next(self._serials))
                self._new_work(step, "decode")
            return step
        if prefill.is_started:
            self._queue.remove(prefill)
            return prefill
        members = self.policy.batch(prefill, islice(self._queue.in_order(), BATCH_SCAN), now)
        for member in members:
            self._queue.remove(member)
            self._count_waiting(member, -1)
        entry = prefill if len(members) == 1 else self._merge(prefill, members)
        self._new_work(entry, "prefill")
        return entry

    def _merge(self, head: Entry, members: list[Entry]) -> Entry:
        jobs = [member.jobs[0] for member in members]
        seconds = self.cost_model.batch_prefill_s(
            (job.prompt_tokens, job.context_tokens) for job in jobs
        )
        merged = Entry(jobs, head.serial, seconds)
        since = [member.late_since_s for member in members if member.late_since_s is not None]
        merged.late_since_s = min(since, default=None)
        for member in members:
            member.has_ended = True
        self._prefills.update((job.id, merged) for job in jobs)
        return merged

    def _suspend(self, entry: Entry, now: float, *, yields: bool) -> None:
        assert entry.work is not None
        entry.work.suspensions += 1
        entry.yields += yields
        entry.is_suspended = True
        entry.since_s = now
        if not entry.is_decode:
            self._queue.push(entry, now)

    def _dispatch(self, entry: Entry, now: float) -> bool:
        """Make an entry current; returns whether it was suspended."""
        assert entry.work is not None
        is_resume = entry.is_suspended
        if is_resume:
            entry.work.suspended_s += now - entry.since_s
        entry.is_suspended = False
        entry.since_s = now
        self._current = entry
        return is_resume

    def _decision(
        self,
        reason: str,
        again_at: float,
        dispatch: Work | None = None,
        is_resume: bool = False,
        preempted: Entry | None = None,
    ) -> Decision:
        wake_at = min(again_at, self._next_hopeless_s())
        return Decision(
            cancel=tuple(self._cancelled_works),
            dropped=tuple(self._dropped),
            dispatch=dispatch,
            is_resume=is_resume,
            preempted=preempted.work if preempted is not None else None,
            wake_at=wake_at if wake_at < math.inf else None,
            reason=reason,
        )

    # -- bookkeeping -------------------------------------------------------------------------

    def _new_entry(self, job: Job, serial: int) -> Entry:
        seconds = self.cost_model.prefill_s(job.prompt_tokens, job.context_tokens)
        return Entry([job], serial, seconds)

    def _new_work(self, entry: Entry, kind: WorkKind) -> None:
        ids = tuple(job.id for job in entry.jobs)
        work = Work(next(self._work_ids), kind, ids, entry.deadline_s, entry.total_s)
        entry.work = work
        self._works[work.id] = entry

    def _release(self, entry: Entry) -> None:
        """Forget a work that has ended, running or suspended."""
        assert entry.work is not None
        entry.has_ended = True
        del self._works[entry.work.id]
        if entry is self._current:
            self._current = None
        if entry in self._queue:
            self._queue.remove(entry)
        else:
            self.policy.left(entry)

    def _count_waiting(self, entry: Entry, sign: int) -> None:
        self._waiting_jobs += sign
        self._waiting_tokens += sign * entry.prompt_tokens

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

    def _hopeless_at(self, job: Job, entry: Entry) -> float:
        """Return from when on the deadline is out of reach: by the most optimistic prediction."""
        if entry is self._current:
            return job.ttft_deadline_s
        return job.ttft_deadline_s - self.cost_model.optimistic_prefill_s(entry.remaining_s)
