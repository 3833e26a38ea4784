"""The decoding sequences and when their next step is due; the scheduler asks it and the queue.

docs/scheduling.md states the rule ("Decode steps"): when a step goes before prefills, who is in it
and how wide it is. Long because every method changes the same lines and counts.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from flowprefill.scheduling.cost_model import RunShape
from flowprefill.scheduling.job import BACKGROUND
from flowprefill.scheduling.reasons import Reason
from flowprefill.scheduling.step_time import StepTime
from flowprefill.scheduling.work import Verdict, Work

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flowprefill.scheduling.cost_model import CostModel
    from flowprefill.scheduling.interface import SchedulerSettings
    from flowprefill.scheduling.job import Job

PACED, PLAIN, BEHIND = range(3)  # bands: with an objective that can be met, without, background
PACE = 0.9  # share of a TPOT objective that a step for it may take, by prediction
LEARNS = 0.3  # of how late a due step's tokens were, how much earlier the next one begins
# Streams go on at a quarter of their pace however many wait: behind a backlog that never ends,
# others' too, nothing makes up for it. It costs a burst hardly anything: few steps are so narrow.
LEAST_WORTH = 0.25
MOST_STALL = 4  # times max_stall_s that a stream waits where steps take so long
NO_STEP = Verdict(False, "")  # what runs instead has its own reason


@dataclass(slots=True, eq=False)
class DecodingJob:
    """A job that decodes.

    Attributes:
        context_tokens: tokens in its cache.
        last_token_s: when its last token was made.
        due_s: when the next one is due.
        is_held: takes part in no step; one that it was in already still ends with it.
        band: where it waits.
        version: which heap record counts; -1 while it is in a step or held.
    """

    job: Job
    context_tokens: int
    last_token_s: float
    due_s: float = math.inf
    is_held: bool = False
    band: int = PLAIN
    version: int = -1


@dataclass(slots=True)
class Line:
    """Sequences of one client and band that wait for a step, the earliest due first."""

    count: int = 0
    records: list[tuple[float, int, DecodingJob]] = field(default_factory=list)

    def push(self, sequence: DecodingJob) -> None:
        """Add one; its version is new."""
        heapq.heappush(self.records, (sequence.due_s, sequence.version, sequence))
        self.count += 1

    def first(self) -> DecodingJob:
        """Return the one that is due first; there is one."""
        while self.records[0][1] != self.records[0][2].version:
            heapq.heappop(self.records)
        return self.records[0][2]


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
        # By band, then client; of sequences that wait for a step. No line is empty.
        self._idle: tuple[dict[str, Line], ...] = ({}, {}, {})
        self._idle_count = 0
        self._idle_context = 0
        self._idle_best_effort = 0
        self._tpots: Counter[float] = Counter()  # of all but held ones; inf: no objective
        self._joining = 0  # jobs that wait for their prefill, or are in it, and then decode
        self._versions = count()
        self.held = 0
        self._last_step_end_s = -math.inf
        self._step_taken = (-math.inf, 0.0)  # when, and how long it takes by the model alone
        self._step_time = StepTime(self._model_s(1, 0))
        self._head_start_s = 0.0  # that steps need before they are due, beyond their time
        self._step_aim_s = math.nan  # when the step's tokens are due, if it began as late as it may
        self._rows = settings.max_running  # that the last step might have
        self.step: Work | None = None

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._sequences

    @property
    def is_ready(self) -> bool:
        """Whether a step can run: a suspended one, or sequences that wait for one."""
        return self.step is not None or self._idle_count > 0

    def expect(self, job: Job, change: int) -> None:
        """Count a job in (1) whose prefill waits, or out (-1) when it has ended or the job has."""
        if job.decodes and job.service_class != BACKGROUND:
            self._joining += change

    def add(self, job: Job, context_tokens: int, now: float) -> None:
        """Begin to decode a job whose prefill has ended now."""
        sequence = DecodingJob(job, context_tokens, now)
        self._sequences[job.id] = sequence
        self._count(job, 1)
        self._wait(sequence, self._stall_s())

    def discard(self, job: Job) -> None:
        """End a sequence; the caller takes it out of a running step."""
        sequence = self._sequences.pop(job.id)
        self.held -= sequence.is_held
        if not sequence.is_held:
            self._count(job, -1)
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
        self._count(sequence.job, -1 if is_held else 1)
        if is_held:
            if sequence.version >= 0:
                self._leave_idle(sequence)
            self.set_step_due()
            return
        sequence.due_s += now - sequence.last_token_s
        sequence.last_token_s = now
        if self.step is None or sequence.job not in self.step.jobs:
            self._wait(sequence, self._stall_s())
        self.set_step_due()

    def take_step(self, serial: int, now: float) -> Work:
        """Make a step of those whose turn it is; they stay in it until it ends."""
        latest, earliest = self._latest(*self._next_step()[:2])
        taken = self._choose(now)
        context = sum(sequence.context_tokens for sequence in taken)
        seconds = self._cost_model.decode_s(len(taken), context)
        self.step = Work([sequence.job for sequence in taken], serial, seconds, "decode")
        self.step.shape = RunShape(len(taken), context, len(taken))
        self.step.deadline_s = min(sequence.due_s for sequence in taken)
        self._step_aim_s = self.step.deadline_s if now >= latest > earliest else math.nan
        self._step_taken = (now, self._model_s(len(taken), context))
        return self.step

    def end_step(self, now: float, ends: frozenset[str]) -> list[Job]:
        """Give the step's sequences their token; returns the jobs that end with it."""
        assert self.step is not None
        if not self.step.suspensions:
            since_s, model_s = self._step_taken
            rows = self.step.shape.tokens if self.step.shape else 0  # those that left, too
            self._step_time.observe(model_s, rows, now - since_s)
            self._learn_head_start(now)
        ended = [job for job in self.step.jobs if job.id in ends]
        stall_s = self._stall_s()  # of all the same
        for job in self.step.jobs:
            sequence = self._sequences[job.id]
            sequence.context_tokens += 1
            sequence.last_token_s = now
            if job.id not in ends:
                self._wait(sequence, stall_s)
        for job in ended:
            self.discard(job)
        self.drop_step(now)
        return ended

    def set_step_due(self) -> None:
        """Note when the step's first token is due, now that who waits for it is another."""
        if self.step is not None:
            sequences = [self._sequences[job.id] for job in self.step.jobs]
            due = (sequence.due_s for sequence in sequences if not sequence.is_held)
            self.step.deadline_s = min(due, default=self.step.deadline_s)

    def drop_step(self, now: float) -> None:
        """Forget the step: it has ended, or no sequence in it is live."""
        self.step = None
        self._last_step_end_s = now

    def share(self) -> float:
        """Return the share of the device's time that steps take while prefills wait, as predicted.

        It is what `goes_first` gives them until all that wait have been prefilled: a step for each
        TPOT of the strictest objective, and if there are sequences without one, a step for each
        longest wait of theirs and their part of `idle_share`; `decode_share` at most, as ever.
        Steps that would make a prefill late wait, which is not counted.
        """
        rows = min(len(self) - self.held, self._settings.max_running)
        if not self._tpots:
            return 0.0  # background has no steps while prefills wait
        at_rest = self.step.shape.pairs if self.step is not None and self.step.shape else 0
        context = int((self._idle_context + at_rest) * rows / (len(self) - self.held))
        step_s, least = self._step_s(rows, context), 0.0
        if math.inf in self._tpots:
            least = self._settings.idle_share * self._mean_worth(rows, context)
        return max(self._due_share(step_s), least)

    def goes_first(self, prefill: Work | None, now: float, waiting: Iterable[Work] = ()) -> Verdict:
        """Return whether a step should run now rather than the prefill that runs or is next.

        Args:
            waiting: prefills that come after that one, in order; it may be among them.
        """
        if not self.is_ready:
            return NO_STEP
        if prefill is None:
            return Verdict(True, Reason.NOTHING_TO_PREFILL)
        seconds, due, rows, context = self._next_step()
        settings = self._settings
        latest, earliest = self._latest(seconds, due)
        early = latest  # from when on it may go first where that does no harm
        if self._idle_best_effort or (self.step and any(map(_is_best_effort, self.step.jobs))):
            pause = seconds * (1.0 / (settings.idle_share * self._worth(rows, context)) - 1.0)
            early = min(latest, max(self._last_step_end_s + pause, earliest))
        if now < early:
            return NO_STEP._replace(again_at=early)
        if now < latest and self._makes_late(seconds, prefill, waiting, now):
            return NO_STEP._replace(again_at=latest)
        ends = now + prefill.remaining_s
        is_on_time = ends <= prefill.deadline_s < math.inf
        would_miss = is_on_time and ends + seconds + settings.max_blocking_s > prefill.deadline_s
        if would_miss and prefill.deadline_s <= due and now < due:
            return NO_STEP._replace(again_at=due)  # the prefill's deadline is the earlier one
        return Verdict(True, Reason.STEP_IS_DUE)

    def _latest(self, seconds: float, due: float) -> tuple[float, float]:
        """Return when the next step goes before prefills at the latest, and when it may at all."""
        settings = self._settings
        earliest = self._last_step_end_s + seconds * (1.0 / settings.decode_share - 1.0)
        begin = due - seconds - settings.max_blocking_s - self._head_start_s
        return max(begin, earliest), earliest

    def _learn_head_start(self, now: float) -> None:
        """Learn from a step whose tokens are there: each wakes up, blocks and takes its time anew.

        A stream that is late by a hundredth each time misses its objective: on average steps are to
        end `max_blocking_s` before they are due.
        """
        if not math.isnan(self._step_aim_s):
            late_s = now - self._step_aim_s + self._settings.max_blocking_s
            most = self._step_taken[1]  # another step's time
            self._head_start_s = min(max(self._head_start_s + LEARNS * late_s, 0.0), most)

    def _makes_late(
        self, step_s: float, prefill: Work, waiting: Iterable[Work], now: float
    ) -> bool:
        """Whether a step that could wait would make a prefill late, with those that cannot."""
        stretch = 1.0 / (1.0 - self._due_share(step_s))
        work_s = 0.0
        for work in (prefill, *(other for other in waiting if other is not prefill)):
            left_s = work.deadline_s - now
            if not work_s + work.remaining_s <= left_s < math.inf:
                continue
            work_s += work.remaining_s
            if work_s * stretch + step_s + self._settings.max_blocking_s > left_s:
                return True
        return False

    def _due_share(self, step_s: float) -> float:
        """Return the share of the time that steps are due at the latest, `decode_share` at most."""
        every_s = min(self._tpots, default=math.inf)
        if math.inf in self._tpots:
            every_s = min(every_s, self._stall_s())
        share = self._settings.decode_share
        return min(step_s / every_s, share) if every_s else share

    def _next_step(self) -> tuple[float, float, int, int]:
        """Return (predicted seconds left, due time, rows, context) of the step that would run."""
        step = self.step
        if step is None:
            return self._idle_step()
        due, shape = step.deadline_s, step.shape
        assert shape is not None
        if self._idle_count:  # who waits behind it is due too, a step after it
            seconds, idle_due, _, _ = self._idle_step()
            due = min(due, idle_due - seconds / self._settings.decode_share)
        return step.remaining_s, due, shape.tokens, int(shape.pairs)

    def _idle_step(self) -> tuple[float, float, int, int]:
        rows = min(self._idle_count, self._rows)
        context = self._idle_context * rows // self._idle_count
        due = min(line.first().due_s for lines in self._idle for line in lines.values())
        return self._cost_model.decode_s(rows, context), due, rows, context

    def _worth(self, rows: int, context: int, joined: int = 0) -> float:
        """Return what a step is worth, by the rule; `joined` of its rows wait as yet."""
        most = min(rows - joined + self._joining, self._rows)
        if most <= rows:
            return 1.0
        pace = rows / self._step_s(rows, context)
        later = most / self._step_s(most, context * most // rows)
        return min(max(pace / later, LEAST_WORTH), 1.0)

    def _mean_worth(self, rows: int, context: int) -> float:
        """Return it for the time until all that wait have been prefilled: each is a row more."""
        more = max(min(self._joining, self._rows - rows), 0)
        if not more:
            return 1.0
        half = more // 2
        halfway = self._worth(rows + half, context * (rows + half) // rows, half)
        return 1.0 - (1.0 - halfway) * more / self._joining

    def _stall_s(self) -> float:
        """Return how long a sequence without an objective waits for its next step at most.

        Where steps take long, as long as the least that a step is worth has it wait, within bounds.
        """
        settings = self._settings
        stall_s = self._step_s(1, 0) / (settings.idle_share * LEAST_WORTH)
        return min(max(stall_s, settings.max_stall_s), MOST_STALL * settings.max_stall_s)

    def _step_s(self, rows: int, context: int) -> float:
        """Return what passes from a step to the next one, as learnt."""
        return self._step_time.seconds(self._model_s(rows, context), rows)

    def _model_s(self, rows: int, context: int) -> float:
        """Return a step's time without the online correction, learnt from steps of other widths."""
        return self._cost_model.decode_s(rows, context) / self._cost_model.correction("decode")

    def _choose(self, now: float) -> list[DecodingJob]:
        """Take those that the next step is for."""
        most = min(self._idle_count, self._settings.max_running)
        context = self._idle_context / self._idle_count

        def pace_s(rows: int) -> float:
            return self._step_s(rows, int(rows * context))

        plain = tuple(self._idle[PLAIN].values())
        is_one_due = any(line.first().due_s <= now for line in plain)
        taken: list[DecodingJob] = []
        self._take_turns(PACED, most - is_one_due, taken, now + 2 * pace_s(most))
        limits = [PACE * sequence.job.tpot_s for sequence in taken]
        if len(plain) > 1:
            limits.append(len(plain) * pace_s(min(line.count for line in plain)))
        fitting = bisect_right(range(1, most + 1), min(limits, default=math.inf), key=pace_s)
        rows = max(fitting, min(len(taken) + 1, most))
        self._rows = rows if rows < most else self._settings.max_running
        for band in (PLAIN, PACED, BEHIND):
            self._take_turns(band, rows, taken)
        return taken

    def _take_turns(
        self, band: int, rows: int, taken: list[DecodingJob], due_by: float = math.inf
    ) -> None:
        """Add to `taken` until it has so many: of each client one in turn, if due by then."""
        lines = sorted(self._idle[band].values(), key=lambda line: line.first().due_s)
        while len(taken) < rows and lines:
            lines = [line for line in lines if line.count and line.first().due_s <= due_by]
            for line in lines[: rows - len(taken)]:
                taken.append(line.first())
                self._leave_idle(taken[-1])

    def _wait(self, sequence: DecodingJob, stall_s: float) -> None:
        if sequence.is_held:
            return
        job = sequence.job
        is_best_effort = _is_best_effort(job)
        wanted = stall_s if is_best_effort else job.tpot_s
        sequence.band = PACED if self._can_be_paced(sequence) else PLAIN
        if job.service_class == BACKGROUND:
            wanted, sequence.band = math.inf, BEHIND
        sequence.due_s = sequence.last_token_s + wanted
        sequence.version = next(self._versions)
        self._idle[sequence.band].setdefault(job.client, Line()).push(sequence)
        self._idle_count += 1
        self._idle_context += sequence.context_tokens
        self._idle_best_effort += is_best_effort

    def _can_be_paced(self, sequence: DecodingJob) -> bool:
        """Whether it has an objective that a step for it alone would meet."""
        pace_s = PACE * sequence.job.tpot_s
        if math.isinf(pace_s):
            return False
        return self._step_s(1, sequence.context_tokens) <= pace_s

    def _count(self, job: Job, change: int) -> None:
        if job.service_class != BACKGROUND:
            self._tpots[job.tpot_s] += change
            if not self._tpots[job.tpot_s]:
                del self._tpots[job.tpot_s]

    def _leave_idle(self, sequence: DecodingJob) -> None:
        sequence.version = -1
        lines, client = self._idle[sequence.band], sequence.job.client
        lines[client].count -= 1
        if not lines[client].count:
            del lines[client]
        self._idle_count -= 1
        self._idle_context -= sequence.context_tokens
        self._idle_best_effort -= _is_best_effort(sequence.job)


def _is_best_effort(job: Job) -> bool:
    return math.isinf(job.tpot_s) and job.service_class != BACKGROUND
