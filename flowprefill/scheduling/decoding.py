"""The decoding sequences and when their next step is due; the scheduler asks it and the queue.

A decode step is one short work over the sequences that wait for a token. Against prefills:

- Nothing to prefill: it runs at once.
- A sequence with a TPOT objective is due at its last token + tpot; one without at its last token +
  max_stall_s. The step starts when it must to be in time, prefill or not, with one exception: a
  prefill with an earlier deadline that it would make miss goes first.
- While a sequence without an objective waits, steps also start earlier, after a pause of
  (1 / idle_share - 1) steps, if that makes no prefill miss its deadline.
- While prefills wait, a step starts (1 / decode_share - 1) step times after the last one's end at
  the earliest: prefills keep at least 1 - decode_share of the time.

Sequences of the class `background` are never due: they take part where a step has room, and have
steps of their own only while nothing is to be prefilled.

Held sequences, whose tokens no client takes, are in no step and never due. One that is let go on
counts as if its last token had been made then: the time for which it was held makes no other wait.

Bound: a decode step starts no later than max(due time, that pause) + one boundary; and one
prefill's deadline never makes another sequence wait past its own due time. Sequences over
max_running take turns, the earliest due first.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from flowprefill.scheduling.job import BACKGROUND
from flowprefill.scheduling.work import Verdict, Work

if TYPE_CHECKING:
    from flowprefill.scheduling.cost_model import CostModel
    from flowprefill.scheduling.interface import SchedulerSettings
    from flowprefill.scheduling.job import Job


@dataclass(slots=True, eq=False)
class DecodingJob:
    """A job that decodes.

    Attributes:
        context_tokens: tokens in its cache.
        last_token_s: when its last token was made.
        due_s: when the next one is due.
        is_held: takes part in no step; one that it was in already still ends with it.
        version: which heap record counts; -1 while it is in a step or held.
    """

    job: Job
    context_tokens: int
    last_token_s: float
    due_s: float = math.inf
    is_held: bool = False
    version: int = -1


class Decoding:
    """Sequences by due time, and the one decode step that runs or is suspended.

    Attributes:
        held: how many of the sequences are held.
        step: the step that runs or is suspended.
    """

    def __init__(self, cost_model: CostModel, settings: SchedulerSettings) -> None:
        self._cost_model = cost_model
        self._settings = settings
        self._sequences: dict[str, DecodingJob] = {}
        self._idle: list[tuple[float, int, DecodingJob]] = []
        self._idle_count = 0
        self._idle_context = 0
        self._idle_best_effort = 0
        self._versions = count()
        self.held = 0
        self._last_step_end_s = -math.inf
        self.step: Work | None = None

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._sequences

    @property
    def is_ready(self) -> bool:
        """Whether a step can run: a suspended one, or sequences that wait for one."""
        return self.step is not None or self._idle_count > 0

    def add(self, job: Job, context_tokens: int, now: float) -> None:
        """Begin to decode a job whose prefill has ended now."""
        sequence = DecodingJob(job, context_tokens, now)
        self._sequences[job.id] = sequence
        self._wait(sequence)

    def discard(self, job: Job) -> None:
        """End a sequence; the caller takes it out of a running step."""
        sequence = self._sequences.pop(job.id)
        self.held -= sequence.is_held
        if sequence.version >= 0:
            self._leave_idle(sequence)

    def hold(self, job_id: str, *, is_held: bool, now: float) -> None:
        """Keep a sequence out of further steps, or let it into them again.

        Nothing happens if the job does not decode, or is held, or is not, already.
        """
        sequence = self._sequences.get(job_id)
        if sequence is None or sequence.is_held == is_held:
            return
        sequence.is_held = is_held
        self.held += 1 if is_held else -1
        if is_held:
            if sequence.version >= 0:
                self._leave_idle(sequence)
            return
        sequence.last_token_s = now
        if self.step is None or sequence.job not in self.step.jobs:
            self._wait(sequence)

    def take_step(self, serial: int) -> Work:
        """Make a step of the sequences that are due first; they stay in it until it ends."""
        taken: list[DecodingJob] = []
        while len(taken) < self._settings.max_running and self._peek() is not None:
            _, _, sequence = heapq.heappop(self._idle)
            self._leave_idle(sequence)
            taken.append(sequence)
        context = sum(sequence.context_tokens for sequence in taken)
        seconds = self._cost_model.decode_s(len(taken), context)
        self.step = Work([sequence.job for sequence in taken], serial, seconds, "decode")
        self.step.deadline_s = min(sequence.due_s for sequence in taken)
        return self.step

    def end_step(self, now: float, ends: frozenset[str]) -> list[Job]:
        """Give the step's sequences their token; returns the jobs that end with it."""
        assert self.step is not None
        ended = [job for job in self.step.jobs if job.id in ends]
        for job in self.step.jobs:
            sequence = self._sequences[job.id]
            sequence.context_tokens += 1
            sequence.last_token_s = now
            if job.id not in ends:
                self._wait(sequence)
        for job in ended:
            self.discard(job)
        self.drop_step(now)
        return ended

    def drop_step(self, now: float) -> None:
        """Forget the step: it has ended, or no sequence in it is live."""
        self.step = None
        self._last_step_end_s = now

    def goes_first(self, prefill: Work | None, now: float) -> Verdict:
        """Return whether a step should run now rather than the prefill that runs or is next."""
        if not self.is_ready:
            return Verdict(False, "nothing decodes")
        if prefill is None:
            return Verdict(True, "nothing to prefill")
        seconds, due = self._next_step()
        settings = self._settings
        earliest = self._last_step_end_s + seconds * (1.0 / settings.decode_share - 1.0)
        latest = max(due - seconds - settings.max_blocking_s, earliest)
        early = latest  # from when on it may go first where that does no harm
        if self._idle_best_effort:
            pause = seconds * (1.0 / settings.idle_share - 1.0)
            early = min(latest, max(self._last_step_end_s + pause, earliest))
        if now < early:
            return Verdict(False, "decode can wait", early)
        ends = now + prefill.remaining_s
        is_on_time = ends <= prefill.deadline_s < math.inf
        would_miss = is_on_time and ends + seconds + settings.max_blocking_s > prefill.deadline_s
        if now < latest and would_miss:
            return Verdict(False, "a decode step would make the prefill late", latest)
        if would_miss and prefill.deadline_s <= due and now < due:
            return Verdict(False, "the prefill's deadline is earlier", due)
        return Verdict(True, "a decode step is due")

    def _next_step(self) -> tuple[float, float]:
        """Return (predicted seconds left, due time) of the step that would run."""
        if self.step is not None:
            return self.step.remaining_s, self.step.deadline_s
        top = self._peek()
        assert top is not None
        rows = min(self._idle_count, self._settings.max_running)
        context = self._idle_context * rows // self._idle_count
        return self._cost_model.decode_s(rows, context), top.due_s

    def _peek(self) -> DecodingJob | None:
        while self._idle and self._idle[0][1] != self._idle[0][2].version:
            heapq.heappop(self._idle)
        return self._idle[0][2] if self._idle else None

    def _wait(self, sequence: DecodingJob) -> None:
        if sequence.is_held:
            return
        is_best_effort = _is_best_effort(sequence.job)
        wanted = self._settings.max_stall_s if is_best_effort else sequence.job.tpot_s
        if sequence.job.service_class == BACKGROUND:
            wanted = math.inf
        sequence.due_s = sequence.last_token_s + wanted
        sequence.version = next(self._versions)
        heapq.heappush(self._idle, (sequence.due_s, sequence.version, sequence))
        self._idle_count += 1
        self._idle_context += sequence.context_tokens
        self._idle_best_effort += is_best_effort

    def _leave_idle(self, sequence: DecodingJob) -> None:
        sequence.version = -1
        self._idle_count -= 1
        self._idle_context -= sequence.context_tokens
        self._idle_best_effort -= _is_best_effort(sequence.job)


def _is_best_effort(job: Job) -> bool:
    return math.isinf(job.tpot_s) and job.service_class != BACKGROUND
