"""What a policy is: order, preemption, packing; the scheduler asks, users may write their own."""

# ruff: noqa: ARG002 (not every policy needs all that it is given)

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from flowprefill.scheduling.cost_model import attention_pairs
from flowprefill.scheduling.reasons import Reason
from flowprefill.scheduling.work import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flowprefill.scheduling.cost_model import CostModel
    from flowprefill.scheduling.interface import SchedulerSettings
    from flowprefill.scheduling.work import Rank, Work


class Policy(Protocol):
    """The five questions a scheduler asks. Calls come from one thread and must be deterministic.

    Attributes:
        name: shown in logs and metrics.
        decode_preempts: whether a decode step that is due may suspend a running prefill.
    """

    name: str
    decode_preempts: bool

    def rank(self, work: Work, now: float) -> Rank:
        """Return where a prefill stands, and until when that holds."""
        ...

    def left(self, work: Work) -> None:
        """Hear that a work no longer waits: it runs now, or has ended."""
        ...

    def pick(self, waiting: Sequence[Work], now: float) -> Work:
        """Return which of the first waiting works (at least one, in order) goes next."""
        ...

    def should_preempt(self, current: Work, waiting: Sequence[Work], now: float) -> Verdict:
        """Return whether one of the first waiting works should suspend the current work."""
        ...

    def batch(self, head: Work, waiting: Iterable[Work], now: float) -> list[Work]:
        """Return the works to prefill together: `head`, then others of `waiting` (in order).

        Works that have been started cannot be packed.
        """
        ...

    def course(self, waiting: Sequence[Work], now: float) -> Sequence[Work]:
        """Return the waiting works (in order) as they would run from `now` on if none came.

        For predictions: `now` may be later than the time at which it is asked. Nothing is changed.
        """
        ...


class Packing:
    """Sums of a prefill that is being packed; within the bounds on tokens and jobs."""

    def __init__(self, head: Work, cost_model: CostModel, settings: SchedulerSettings) -> None:
        self._cost_model = cost_model
        self._settings = settings
        self._tokens = 0
        self._pairs = 0.0
        self._head_rows = 0
        self.members: list[Work] = []
        self.seconds = 0.0  # predicted time of what is packed
        self.add(head)

    @property
    def is_full(self) -> bool:
        """Whether nothing more can be packed."""
        return (
            self._tokens >= self._settings.max_batch_tokens
            or len(self.members) >= self._settings.max_batch_jobs
        )

    def fits(self, work: Work) -> bool:
        """Return whether the work can be packed within the token bound."""
        room = self._settings.max_batch_tokens - self._tokens
        return not work.is_started and work.jobs[0].prompt_tokens <= room

    def seconds_with(self, work: Work) -> float:
        """Return the predicted time of the prefill if the work is added."""
        job = work.jobs[0]
        return self._cost_model.packed_prefill_s(
            self._tokens + job.prompt_tokens,
            self._pairs + attention_pairs(job.prompt_tokens, job.context_tokens),
            self._head_rows + job.head_rows,
        )

    def add(self, work: Work) -> None:
        """Pack the work."""
        self.members.append(work)
        for job in work.jobs:
            self._tokens += job.prompt_tokens
            self._pairs += attention_pairs(job.prompt_tokens, job.context_tokens)
            self._head_rows += job.head_rows
        self.seconds = self._cost_model.packed_prefill_s(self._tokens, self._pairs, self._head_rows)


class BasePolicy:
    """The answers most policies share: first goes next, pack in order while there is room."""

    name = ""
    decode_preempts = True

    def __init__(self, cost_model: CostModel, settings: SchedulerSettings) -> None:
        self.cost_model = cost_model
        self.settings = settings

    def rank(self, work: Work, now: float) -> Rank:
        """Return where a prefill stands, and until when that holds."""
        raise NotImplementedError(f"policy {self.name!r} has no order")

    def course(self, waiting: Sequence[Work], now: float) -> Sequence[Work]:
        """Return them as they are."""
        return waiting

    def left(self, work: Work) -> None:
        """Keep no state."""

    def pick(self, waiting: Sequence[Work], now: float) -> Work:
        """Return the first."""
        return waiting[0]

    def should_preempt(self, current: Work, waiting: Sequence[Work], now: float) -> Verdict:
        """Preempt a prefill for whatever is strictly before it; a decode step never."""
        if current.is_decode:
            return Verdict(False, Reason.STEP_RUNS)
        mine = (self.rank(current, now).key, current.priority)
        if (waiting[0].rank.key, waiting[0].priority) < mine:
            return Verdict(True, Reason.IS_BEFORE, by=waiting[0])
        return Verdict(False, Reason.NOTHING_IS_BEFORE)

    def batch(self, head: Work, waiting: Iterable[Work], now: float) -> list[Work]:
        """Pack in order until one does not fit."""
        packing = Packing(head, self.cost_model, self.settings)
        for work in waiting:
            if packing.is_full:
                break
            if work is head or work.is_started:
                continue
            if not packing.fits(work):
                break
            packing.add(work)
        return packing.members
