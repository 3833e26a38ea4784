"""Witness: stands between a scheduler and who drives it, and holds each decision to the rules.

The rules are those at the head of flowprefill/scheduling/interface.py. The witness keeps a record
of its own of which jobs are live and where they are, made of the events and decisions alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowprefill.scheduling import (
    Arrival,
    Cancelled,
    Failed,
    Finished,
    Held,
    Load,
    TimerFired,
)
from flowprefill.scheduling.cost_model import attention_pairs
from flowprefill.scheduling.job import BACKGROUND
from flowprefill.scheduling.reasons import Reason

if TYPE_CHECKING:
    from flowprefill.scheduling import Decision, Job, Scheduler, SchedulerEvent, Work


class Witness:
    """Takes the place of a scheduler's `on_event`.

    Attributes:
        events: how many there were.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._on_event = scheduler.on_event
        scheduler.on_event = self.on_event  # type: ignore[method-assign]
        self.events = 0
        self._now = 0.0
        self._wake_at: float | None = None
        self._current: Work | None = None
        self._live: dict[str, Job] = {}  # each in one of these three:
        self._waiting: dict[str, Job] = {}
        self._prefilling: dict[str, Job] = {}
        self._decoding: dict[str, Job] = {}
        self._held: set[str] = set()
        self._members: dict[int, tuple[Work, tuple[Job, ...]]] = {}  # of started works

    def on_event(self, event: SchedulerEvent, now: float) -> Decision:
        """Have the scheduler decide and check what it says."""
        self._now = max(now, self._now)
        self.events += 1
        self._note(event)
        decision = self._on_event(event, now)
        self._carry_out(decision)
        self._check_state(decision)
        return decision

    # -- the record ----------------------------------------------------------------------------

    def _note(self, event: SchedulerEvent) -> None:
        match event:
            case Arrival(job):
                assert job.id not in self._live
                self._live[job.id] = job
                (self._waiting if job.prompt_tokens else self._decoding)[job.id] = job
            case Finished(work_id, ends):
                for job in self._leave(work_id):
                    if self._prefilling.pop(job.id, None) and job.id not in ends:
                        self._decoding[job.id] = job
                    elif job.id in ends:
                        self._forget(job.id)
            case Failed(work_id):
                for job in self._leave(work_id):
                    self._forget(job.id)
            case Cancelled(job_id):
                self._forget(job_id)
            case Held(job_id, is_held):
                if job_id in self._decoding:
                    (self._held.add if is_held else self._held.discard)(job_id)
            case TimerFired():
                assert self._wake_at is not None, "a timer that was not asked for"
                assert self._wake_at <= self._now, "woken before it asked to be"

    def _leave(self, work_id: int) -> list[Job]:
        """Take a work off the record that has ended; returns its live jobs."""
        work, jobs = self._members.pop(work_id, (None, ()))
        if work is self._current:
            self._current = None
        return [job for job in jobs if self._is_live(job)]

    def _forget(self, job_id: str) -> None:
        for place in (self._live, self._waiting, self._prefilling, self._decoding):
            place.pop(job_id, None)
        self._held.discard(job_id)

    def _is_live(self, job: Job) -> bool:
        return self._live.get(job.id) is job

    # -- the decision --------------------------------------------------------------------------

    def _carry_out(self, decision: Decision) -> None:
        self._wake_at = decision.wake_at
        assert decision.reason in list(Reason)
        assert decision.wake_at is None or decision.wake_at > self._now, decision
        for job_id, _ in decision.dropped:
            job = self._waiting.get(job_id) or self._prefilling[job_id]  # no token as yet
            assert job.on_miss == "drop", "it may not be given up"
            assert self._now + self._longest_s(job) > job.ttft_deadline_s - 1e-9, "it may be met"
            self._forget(job_id)
        given_up = {
            number
            for number, (_, jobs) in self._members.items()
            if not any(map(self._is_live, jobs))
        }
        assert {work.id for work in decision.cancel} == given_up, "works without a live job"
        for number in given_up:
            self._leave(number)
        if decision.dispatch is None:
            assert decision.preempted is None
        else:
            self._dispatch(decision, decision.dispatch)

    def _dispatch(self, decision: Decision, work: Work) -> None:
        assert decision.preempted is self._current, "what runs is suspended, and nothing else"
        assert work is not self._current
        assert decision.is_resume == (work.id in self._members)
        if not decision.is_resume:
            self._start(work)
        self._current = work

    def _start(self, work: Work) -> None:
        settings, jobs = self._scheduler.settings, tuple(work.jobs)
        assert jobs
        if work.is_decode:
            assert all(self._decoding.get(job.id) is job for job in jobs)
            assert self._held.isdisjoint(work.job_ids), "a held sequence is in a new step"
            assert len(jobs) <= settings.max_running
            assert not any(other.is_decode for other, _ in self._members.values())
        else:
            for job in jobs:
                assert self._waiting.pop(job.id) is job, "prefilled once, and only who waits"
                self._prefilling[job.id] = job
            assert len({job.output for job in jobs}) == 1
            assert len(jobs) == 1 or work.prompt_tokens <= settings.max_batch_tokens
            assert len(jobs) <= settings.max_batch_jobs
            if self._scheduler.policy.name == "slack_edf":
                assert len({job.service_class == BACKGROUND for job in jobs}) == 1
        self._members[work.id] = (work, jobs)

    def _check_state(self, decision: Decision) -> None:
        scheduler = self._scheduler
        assert scheduler.current is self._current
        load = scheduler.load(self._now)
        assert load == Load(
            waiting_jobs=len(self._waiting),
            waiting_tokens=sum(job.prompt_tokens for job in self._waiting.values()),
            backlog_s=load.backlog_s,
            suspended_works=len(self._members) - (self._current is not None),
            decoding=len(self._decoding) - len(self._held),
            held=len(self._held),
        )
        assert load.backlog_s >= -1e-6
        assert 0.0 <= scheduler.decode_share() < 1.0
        if self._current is None:
            assert (load.waiting_jobs, load.suspended_works, load.decoding) == (0, 0, 0), decision
            assert abs(load.backlog_s) < 1e-6
            assert decision.wake_at is None, "nothing is left to wake up for"

    def _longest_s(self, job: Job) -> float:
        """Return what its prefill takes by what is known now, packed as it is."""
        packed = (jobs for work, jobs in self._members.values() if not work.is_decode)
        jobs = next((jobs for jobs in packed if job in jobs), (job,))
        model = self._scheduler.cost_model
        pairs = sum(attention_pairs(one.prompt_tokens, one.context_tokens) for one in jobs)
        tokens, rows = sum(one.prompt_tokens for one in jobs), sum(one.head_rows for one in jobs)
        return model.packed_prefill_s(tokens, pairs, rows)
