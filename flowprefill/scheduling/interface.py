"""Jobs, events and decisions: what the engine and the simulator say to the scheduler and get.

All times are seconds as floats on one monotonic clock, given by the caller with each event. The
rules both sides keep:

1. At most one work is *current*. `Decision.dispatch` makes another one current; the one before
   (`Decision.preempted`) is suspended at its next boundary and stays the caller's to keep. It is
   resumed by being dispatched again (`is_resume`), or given up by `Decision.cancel`.
2. Events are reported in the order in which they happened. A work may finish while a decision that
   suspends it is on its way: its `Finished` then arrives late and is taken as it is. For the same
   reason a work that is dispatched again may have finished already: the caller ignores that
   dispatch, and `Finished` follows.
3. Events about works or jobs that have ended already are ignored, so late ones do no harm.
4. Each job ends exactly once: in `Finished.ends`, `Cancelled`, `Failed` or `Decision.dropped`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowprefill.scheduling.job import BACKGROUND, Job

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flowprefill.scheduling.work import Work


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job is ready to be prefilled (or to decode, when nothing is left to prefill)."""

    job: Job


@dataclass(frozen=True, slots=True)
class Finished:
    """A work ran to its end.

    Attributes:
        ends: jobs of the work that have ended with it; the others decode on.
        executed_s: time its segments took; None: the scheduler uses its own account.
    """

    work_id: int
    ends: frozenset[str] = frozenset()
    executed_s: float | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A job has ended wherever it was: waiting, running, suspended or between two decode steps.

    The caller takes its rows out of a run. The same id may arrive again afterwards.
    """

    job_id: str


@dataclass(frozen=True, slots=True)
class Held:
    """A decoding job takes part in no further decode step, or, `is_held` false, in them again.

    A step that was taken with it ends with it. Nothing happens to a job that does not decode: who
    holds one before its first token says so again after that.
    """

    job_id: str
    is_held: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """A work ended by an error; all its jobs have ended with it."""

    work_id: int


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The time of `Decision.wake_at` has come."""


SchedulerEvent = Arrival | Finished | Cancelled | Held | Failed | TimerFired


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done after one event; carry out in the order of the fields.

    Attributes:
        cancel: works with no live job left: stop and free them. May hold the current one.
        dropped: (job id, reason) of jobs whose deadline can no longer be met: end them.
        dispatch: the work that is current from now on; None: the executor goes on as it is.
        is_resume: `dispatch` was suspended and goes on where it stopped.
        preempted: the work that `dispatch` suspends.
        wake_at: send `TimerFired` at this time unless another event comes first; None: no need.
            Each decision replaces the one before. Always later than the event's time.
        reason: why, for the decision log: a `Reason`, or the words of a policy of one's own.
    """

    cancel: tuple[Work, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    dispatch: Work | None = None
    is_resume: bool = False
    preempted: Work | None = None
    wake_at: float | None = None
    reason: str = ""


@dataclass(slots=True)
class SchedulerSettings:
    """Bounds of the scheduler; the engine fills in those that are in its configuration.

    Attributes:
        max_batch_tokens: most prompt tokens packed in one prefill (a longer prompt goes alone).
        max_batch_jobs: most jobs packed in one prefill.
        max_running: most sequences in one decode step.
        max_blocking_s: what a preemption costs: the longest segment. The one setting that may be
            changed later, by the engine while it is idle.
        max_suspensions: a work suspended so often for other prefills is suspended for one again
            only after it went on for late_slice_s.
        late_share: share of the time that late and best-effort jobs get although jobs that can
            meet their deadline never let up.
        late_patience_s: how long a late or best-effort job waits before that share counts for it.
        late_slice_s: the piece in which that share is granted.
        class_shares: service class -> share of the prefill time it is guaranteed (slack_edf); with
            late_share less than 1 in all.
        decode_share: most of the time that decode steps take while prefills wait.
        idle_share: what decode steps without a TPOT objective aim at while prefills wait; less
            while many that wait would make steps cheaper (docs/scheduling.md).
        max_stall_s: longest wait of a sequence without a TPOT objective for its next step; up to
            four times as long where steps take long (docs/scheduling.md).
    """

    max_batch_tokens: int = 512
    max_batch_jobs: int = 64
    max_running: int = 64
    max_blocking_s: float = 0.002
    max_suspensions: int = 256
    late_share: float = 0.005
    late_patience_s: float = 5.0
    late_slice_s: float = 0.05
    class_shares: Mapping[str, float] = field(default_factory=dict)
    decode_share: float = 0.7
    idle_share: float = 0.25
    max_stall_s: float = 0.5

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_batch_jobs", "max_running"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected an integer >= 1")
        for name in ("late_share", "decode_share", "idle_share"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a share in (0, 1)")
        for name in ("max_blocking_s", "late_patience_s", "max_stall_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number >= 0")
        if not self.late_slice_s > 0:
            raise ValueError(f"late_slice_s: got {self.late_slice_s}, expected a number > 0")
        for name, share in self.class_shares.items():
            if not 0.0 < share < 1.0 or name == BACKGROUND:
                raise ValueError(
                    f"class_shares: got {share} for {name!r}, expected a share in (0, 1) for a "
                    f"class that is not {BACKGROUND!r}"
                )
        if sum(self.class_shares.values()) + self.late_share >= 1.0:
            raise ValueError(
                f"class_shares: got {dict(self.class_shares)}, with late_share {self.late_share}: "
                "expected less than 1 in all"
            )


@dataclass(slots=True)
class Load:
    """What is waiting, for admission and metrics; the scheduler keeps it up to date.

    Attributes:
        waiting_jobs: jobs whose prefill has not started.
        waiting_tokens: prompt tokens of those.
        backlog_s: predicted time of all prefill that is not done, running and suspended included.
        suspended_works: prefills and decode steps that stand still.
        decoding: sequences that decode; held ones left out.
        held: sequences that are held.
    """

    waiting_jobs: int = 0
    waiting_tokens: int = 0
    backlog_s: float = 0.0
    suspended_works: int = 0
    decoding: int = 0
    held: int = 0
