"""Work: what waits for the device or is on it, and what policies say of it: Rank and Verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from flowprefill.scheduling.job import BACKGROUND

if TYPE_CHECKING:
    from flowprefill.scheduling.cost_model import RunShape
    from flowprefill.scheduling.job import Job, WorkKind

OVERRUN = 0.05  # a work past its prediction is taken to need this share of its time so far


class Rank(NamedTuple):
    """Where a work stands.

    Attributes:
        key: the smaller goes first; equal keys are equally urgent. One policy's keys have one form.
        until: the work is ranked anew at this time; always later than now. inf: never.
    """

    key: tuple[float, ...]
    until: float = math.inf


UNRANKED = Rank((math.inf,))


class Verdict(NamedTuple):
    """Whether to preempt, and why (not).

    Attributes:
        again_at: ask again at this time even if no event comes; inf: no need. Later than now.
        by: which work is to run instead; None: a decode step, or nothing.
    """

    preempt: bool
    reason: str
    again_at: float = math.inf
    by: Work | None = None


@dataclass(slots=True, eq=False)
class Work:
    """One or more jobs to prefill together, or one decode step; waiting, running or suspended.

    Made and changed by the scheduler; policies and the scheduler's caller read it. Compared by
    identity.

    Attributes:
        jobs: live jobs, in the order in which they were packed; one while waiting. Shrinks when
            one ends early; the run keeps the rows it was built with.
        serial: order of arrival; breaks the last ties, so that decisions are deterministic.
        predicted_s: predicted time of the whole, undisturbed.
        id: unique for the life of the scheduler, from 1 on; 0 before it was dispatched.
        arrival_s, deadline_s, priority: the smallest among the jobs; inf is best effort. A decode
            step's deadline is that of its first token due; one that could not be kept is moved to
            that of the next job, or where a promise was made anew (slack_edf).
        weight: the jobs' weights added up.
        is_background: whether all its jobs are of the class `background`.
        is_promised: whether one of its jobs was promised to be on time.
        renewals: how many times its promise could not be kept, and a later one was made.
        remaining_s: predicted time that is left.
        fair_arrival_s: from when it counts among those of other tenants: its arrival, or later if
            its tenant has more work than one device does (slack_edf).
        nominal_s: predicted time of the whole without the online correction, so that equal prompts
            have equal ones whenever they arrive.
        executed_s: time it has been executing.
        stretch_s: how much of that since it was last dispatched.
        since_s: when it was last dispatched, suspended or accounted for.
        is_suspended: whether its run stands still.
        suspensions: how many times it was suspended.
        prefill_suspensions: how many of these for another prefill.
        suspended_s: how long it was suspended in all, up to its last resume.
        late_since_s: since when it is known to miss its deadline, or has none (slack_edf).
        is_in_line: whether slack_edf has noted that.
        protected: its jobs that their classes' guaranteed shares promise to be on time, by deadline
            (slack_edf).
        has_ended: it is done with, or went into a packed prefill.
        rank: as of the last ranking in the queue.
        version: which of the queue's records of it counts; -1 when it is not in the queue.
        shape: what its run computes, jobs that end early included; None: not known.
    """

    jobs: list[Job]
    serial: int
    predicted_s: float
    kind: WorkKind = "prefill"
    nominal_s: float = 0.0
    id: int = 0
    arrival_s: float = field(init=False)
    fair_arrival_s: float = field(init=False)
    deadline_s: float = field(init=False)
    priority: int = field(init=False)
    weight: float = field(init=False)
    is_background: bool = field(init=False)
    is_promised: bool = field(init=False)
    remaining_s: float = field(init=False)
    executed_s: float = 0.0
    stretch_s: float = 0.0
    since_s: float = 0.0
    is_suspended: bool = False
    suspensions: int = 0
    prefill_suspensions: int = 0
    suspended_s: float = 0.0
    late_since_s: float | None = None
    is_in_line: bool = False
    protected: list[Job] = field(default_factory=list)
    renewals: int = 0
    has_ended: bool = False
    rank: Rank = UNRANKED
    version: int = -1
    shape: RunShape | None = None

    def __post_init__(self) -> None:
        self.remaining_s = self.predicted_s
        self.arrival_s = min(job.arrival_s for job in self.jobs)
        self.fair_arrival_s = self.arrival_s
        self.deadline_s = min(job.ttft_deadline_s for job in self.jobs)
        self.priority = min(job.priority for job in self.jobs)
        self.weight = sum(job.weight for job in self.jobs)
        self.is_background = all(job.service_class == BACKGROUND for job in self.jobs)
        self.is_promised = any(job.is_promised for job in self.jobs)

    @property
    def is_protected(self) -> bool:
        """Whether a class's guaranteed share promises that one of its jobs is on time."""
        return bool(self.protected)

    @property
    def is_kept(self) -> bool:
        """Whether others are given up first: its class's share protects it, or it was promised."""
        return self.is_protected or self.is_promised

    @property
    def standing(self) -> float:
        """Where not all can be on time those with the smallest are given up first."""
        if self.is_protected:
            return math.inf
        return 1.0 + self.renewals if self.is_promised else 0.0

    @property
    def is_decode(self) -> bool:
        """Whether this is a decode step; it is never in the queue."""
        return self.kind == "decode"

    @property
    def is_started(self) -> bool:
        """Whether a run exists for it, so that it can be resumed but not packed with others."""
        return self.id > 0

    @property
    def job_ids(self) -> tuple[str, ...]:
        """The live jobs' ids."""
        return tuple(job.id for job in self.jobs)

    @property
    def prompt_tokens(self) -> int:
        """Tokens to compute, in all."""
        return sum(job.prompt_tokens for job in self.jobs)

    @property
    def latest_start_s(self) -> float:
        """When it must run at the latest to meet its deadline; inf without a deadline."""
        return self.deadline_s - self.remaining_s

    def left_s(self, now: float) -> float:
        """Return the predicted time that is left at a time, of a work that has run since then."""
        elapsed = max(now - self.since_s, 0.0)
        return max(self.remaining_s - elapsed, OVERRUN * (self.executed_s + elapsed))

    def account_run(self, now: float) -> None:
        """Book the time since `since_s` as executed."""
        self.remaining_s = self.left_s(now)
        elapsed = max(now - self.since_s, 0.0)
        self.since_s = now
        self.executed_s += elapsed
        self.stretch_s += elapsed

    def discard(self, job: Job) -> None:
        """Take a job out that ended early; the run keeps its rows, so its time stays."""
        self.jobs.remove(job)
        if job in self.protected:
            self.protected.remove(job)
        if self.jobs and not self.is_decode:
            if not self.renewals:  # else what was promised anew holds
                self.deadline_s = min(job.ttft_deadline_s for job in self.jobs)
            self.weight = sum(job.weight for job in self.jobs)
