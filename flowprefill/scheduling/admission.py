"""Admission: whether one more job may wait; the engine's gate asks before anything is reserved.

Pure, like the rest of the package: load and outlook in, refusal or None out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flowprefill.scheduling.job import Job
    from flowprefill.scheduling.outlook import Outlook

RefusalReason = Literal["waiting", "tokens", "backlog", "tenant", "deadline"]
HALF_LIFE_S = 5.0  # after so much time with work, what was seen before counts half
PRIOR_S = 1.0  # so much time is taken as seen already, with the device on prefill alone
MAX_STRETCH = 20.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds on what may wait; 0 (tokens) and inf (seconds) are no limit.

    Attributes:
        max_waiting: jobs whose prefill has not started.
        max_waiting_tokens: prompt tokens of those.
        max_backlog_s: predicted time until all that waits has its first token.
        tenant_share: of each bound, what one named tenant may use.
    """

    max_waiting: int = 10_000
    max_waiting_tokens: int = 0
    max_backlog_s: float = math.inf
    tenant_share: float = 1.0

    def __post_init__(self) -> None:
        if self.max_waiting < 1:
            raise ValueError(f"max_waiting: got {self.max_waiting}, expected an integer >= 1")
        if self.max_waiting_tokens < 0:
            raise ValueError(f"max_waiting_tokens: got {self.max_waiting_tokens}, expected >= 0")
        if not self.max_backlog_s > 0:
            raise ValueError(f"max_backlog_s: got {self.max_backlog_s}, expected seconds > 0")
        if not 0 < self.tenant_share <= 1:
            raise ValueError(f"tenant_share: got {self.tenant_share}, expected a share in (0, 1]")

    def of_tenant(self) -> AdmissionLimits:
        """Return the bounds on what one tenant may have waiting."""
        share = self.tenant_share
        return AdmissionLimits(
            max(int(self.max_waiting * share), 1),
            math.ceil(self.max_waiting_tokens * share),
            self.max_backlog_s * share,
        )


@dataclass(slots=True)
class Queued:
    """What waits for its first token: of all, or of one tenant.

    Attributes:
        backlog_s: predicted time until all of it is prefilled, decode steps in between included.
    """

    jobs: int = 0
    tokens: int = 0
    backlog_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a job may not wait.

    Attributes:
        reason: which bound; `deadline` is none but a first token that would come late.
        message: for the user, with the numbers.
        retry_after_s: predicted time until one like it would be admitted, if no other comes; inf:
            it is no use to come back, as the job would be late on an idle device too.
    """

    reason: RefusalReason
    message: str
    retry_after_s: float


def overload_of(queued: Queued, limits: AdmissionLimits, prompt_tokens: int = 0) -> Refusal | None:
    """Return why nothing more may wait, or None if one more job may.

    Args:
        queued: what waits already, the job not counted.
        prompt_tokens: the job's, 0 while they have not been counted.
    """
    wait_s = queued.backlog_s
    if queued.jobs >= limits.max_waiting:
        text = f"{queued.jobs} requests are waiting, at most {limits.max_waiting} may"
        over = queued.jobs + 1 - limits.max_waiting
        return Refusal("waiting", text, wait_s * over / queued.jobs)
    if wait_s > limits.max_backlog_s:
        text = f"{wait_s:.1f} s of work are waiting, at most {limits.max_backlog_s:.1f} s may"
        return Refusal("backlog", text, wait_s - limits.max_backlog_s)
    # A job that finds the queue empty is let in, however long: it would never get in otherwise.
    tokens = queued.tokens + prompt_tokens
    if limits.max_waiting_tokens and queued.jobs and tokens > limits.max_waiting_tokens:
        text = (
            f"{queued.tokens} prompt tokens are waiting; with {prompt_tokens} more they would be "
            f"over {limits.max_waiting_tokens}"
        )
        over = min(tokens - limits.max_waiting_tokens, queued.tokens)
        return Refusal("tokens", text, wait_s * over / queued.tokens)
    return None


def tenant_overload_of(
    queued: Queued, limits: AdmissionLimits, tenant: str, prompt_tokens: int = 0
) -> Refusal | None:
    """Return why nothing more of one tenant may wait, or None; queued: that tenant's alone."""
    refusal = overload_of(queued, limits.of_tenant(), prompt_tokens)
    if refusal is None:
        return None
    return Refusal("tenant", f"of tenant {tenant!r} {refusal.message}", refusal.retry_after_s)


def lateness_of(job: Job, outlook: Outlook, now: float) -> Refusal | None:
    """Return why admitting the job would break a promise, or None if all admitted stay on time.

    A promise is a deadline that an admitted job meets by prediction. The job itself must meet its
    own, and must make none that is on time late.
    """
    due_in_s = job.ttft_deadline_s - outlook.margin_s - now
    if outlook.ttft_s <= due_in_s and not outlook.made_late:
        return None
    if outlook.alone_s > due_in_s:
        text = (
            f"the first token is due in {due_in_s + outlook.margin_s:.3f} s, and the prefill alone "
            f"takes {outlook.alone_s:.3f} s"
        )
        return Refusal("deadline", text, math.inf)
    if outlook.ttft_s > due_in_s:
        text = (
            f"the first token is predicted in {outlook.ttft_s:.3f} s, due in "
            f"{due_in_s + outlook.margin_s:.3f} s, of which {outlook.margin_s:.3f} s are kept free"
        )
    else:
        text = f"{outlook.made_late} admitted requests would miss their deadline because of it"
    over_s = outlook.ttft_s - due_in_s  # it comes down by a second every second
    return Refusal("deadline", text, max(over_s, outlook.clear_s))


class PrefillShare:
    """Share of the device's time that prefills get while some wait; stretches predictions.

    Decode steps in between, and waits for KV blocks that decoding sequences hold, take the rest.
    """

    def __init__(self) -> None:
        self._prefill_s = self._all_s = PRIOR_S
        self._since_s = -math.inf

    def note(self, now: float, *, is_prefilling: bool, is_waiting: bool) -> None:
        """Book the time since the last note, in which this was so."""
        elapsed_s = now - self._since_s
        self._since_s = now
        if not (is_prefilling or is_waiting) or not 0 < elapsed_s < math.inf:
            return
        kept = 0.5 ** (elapsed_s / HALF_LIFE_S)
        # What a time that decays has added up to at its end.
        fresh_s = (1.0 - kept) * HALF_LIFE_S / math.log(2.0)
        self._all_s = self._all_s * kept + fresh_s
        self._prefill_s = self._prefill_s * kept + (fresh_s if is_prefilling else 0.0)

    @property
    def stretch(self) -> float:
        """How many times longer than on prefills alone the backlog takes, in 1..MAX_STRETCH."""
        return self._all_s / max(self._prefill_s, self._all_s / MAX_STRETCH)


class TenantBook:
    """What each named tenant has waiting; seconds are those of prefills alone, not stretched."""

    def __init__(self) -> None:
        self._queued: dict[str, Queued] = {}

    def enter(self, tenant: str, tokens: int, seconds: float) -> None:
        """Count a job in."""
        queued = self._queued.setdefault(tenant, Queued())
        queued.jobs += 1
        queued.tokens += tokens
        queued.backlog_s += seconds

    def leave(self, tenant: str, tokens: int, seconds: float) -> None:
        """Count it out, with the same numbers."""
        queued = self._queued[tenant]
        queued.jobs -= 1
        queued.tokens -= tokens
        queued.backlog_s -= seconds
        if not queued.jobs:
            del self._queued[tenant]

    def of(self, tenant: str, stretch: float) -> Queued:
        """Return what one tenant has waiting."""
        queued = self._queued.get(tenant, Queued())
        return Queued(queued.jobs, queued.tokens, queued.backlog_s * stretch)
