"""Admission: whether one more job may wait; the engine asks before it reserves, and raises.

Pure, like the rest of the package: load and prediction in, refusal or None out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flowprefill.scheduling.interface import Job, Load

RefusalReason = Literal["waiting", "tokens", "backlog", "deadline"]
MIN_RETRY_S = 1.0
MAX_RETRY_S = 120.0  # clients give up on longer ones


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds on what may wait; 0 (tokens) and inf (seconds) are no limit.

    Attributes:
        max_waiting: jobs whose prefill has not started.
        max_waiting_tokens: prompt tokens of those.
        max_backlog_s: predicted time of all prefill that is not done.
        refuse_late: refuse a job that would be dropped anyway: `on_miss="drop"` and a predicted
            time to first token past its deadline.
    """

    max_waiting: int = 10_000
    max_waiting_tokens: int = 0
    max_backlog_s: float = math.inf
    refuse_late: bool = False

    def __post_init__(self) -> None:
        if self.max_waiting < 1:
            raise ValueError(f"max_waiting: got {self.max_waiting}, expected an integer >= 1")
        if self.max_waiting_tokens < 0:
            raise ValueError(f"max_waiting_tokens: got {self.max_waiting_tokens}, expected >= 0")
        if not self.max_backlog_s > 0:
            raise ValueError(f"max_backlog_s: got {self.max_backlog_s}, expected seconds > 0")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a job may not wait.

    Attributes:
        reason: which bound, as metrics count it; `deadline` is no overload but a hopeless job.
        message: for the user, with the numbers.
        retry_after_s: when it may look better, seconds.
    """

    reason: RefusalReason
    message: str
    retry_after_s: float


def refusal_of(
    job: Job, load: Load, limits: AdmissionLimits, now: float, predicted_ttft_s: float
) -> Refusal | None:
    """Return why the job may not be admitted, or None if it may.

    Args:
        load: what waits already, the job not counted.
        predicted_ttft_s: as `Scheduler.predicted_ttft_s` says; looked at for `refuse_late` only.
    """
    tokens = load.waiting_tokens + job.prompt_tokens
    if load.waiting_jobs >= limits.max_waiting:
        text = f"{load.waiting_jobs} requests are waiting, at most {limits.max_waiting} may"
        return Refusal("waiting", text, _retry_s(load.backlog_s / max(load.waiting_jobs, 1)))
    # A request that finds the queue empty is let in, however long: it would never get in otherwise.
    if limits.max_waiting_tokens and load.waiting_jobs and tokens > limits.max_waiting_tokens:
        text = (
            f"{load.waiting_tokens} prompt tokens are waiting; with {job.prompt_tokens} more they "
            f"would be over {limits.max_waiting_tokens}"
        )
        over = (tokens - limits.max_waiting_tokens) / max(load.waiting_tokens, 1)
        return Refusal("tokens", text, _retry_s(load.backlog_s * min(over, 1.0)))
    if load.backlog_s > limits.max_backlog_s:
        text = f"{load.backlog_s:.1f} s of prefill wait, at most {limits.max_backlog_s:.1f} s may"
        return Refusal("backlog", text, _retry_s(load.backlog_s - limits.max_backlog_s))
    is_hopeless = now + predicted_ttft_s > job.ttft_deadline_s
    if limits.refuse_late and job.on_miss == "drop" and is_hopeless:
        text = (
            f"the first token is predicted in {predicted_ttft_s:.3f} s, "
            f"due in {job.ttft_deadline_s - now:.3f} s"
        )
        return Refusal("deadline", text, _retry_s(load.backlog_s))
    return None


def _retry_s(seconds: float) -> float:
    return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)
