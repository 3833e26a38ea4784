"""Outlook: what one more job would mean to itself and to the others; the scheduler makes it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flowprefill.scheduling.cost_model import CostModel
    from flowprefill.scheduling.policies import Policy
    from flowprefill.scheduling.work import Work

SCAN = 1024  # waiting works that are looked at one by one


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is predicted for a job that arrives now.

    Attributes:
        ttft_s: time to its first token, decode steps in between included.
        alone_s: the same on a device that has nothing else to do.
        made_late: admitted jobs that meet their deadline without it and miss it with it.
    """

    ttft_s: float
    alone_s: float
    made_late: int


def outlook_of(
    work: Work,
    current: Work | None,
    waiting: Iterable[Work],
    total_s: float,
    policy: Policy,
    now: float,
    stretch: float,
) -> Outlook:
    """Lay all works out in the policy's order, with the new one and without; changes nothing.

    Args:
        work: the job's, in no queue, its serial below 0.
        current: what runs, accounted for up to now.
        waiting: the others, most urgent first. Beyond SCAN of them the rest counts as ahead.
        total_s: predicted time of all that wait.
        stretch: how many times longer works take because of decode steps in between.

    Cost: O(k log k) for k = min(SCAN, works waiting).
    """
    work.rank = policy.rank(work, now)
    policy.left(work)
    mine = (work.rank.key, work.priority)
    left_s = 0.0
    is_preempting = False
    if current is not None:
        left_s = current.remaining_s
        is_preempting = policy.should_preempt(current, [work], now).preempt
    others = list(islice(waiting, SCAN))
    place = next((i for i, o in enumerate(others) if mine < (o.rank.key, o.priority)), len(others))
    ahead_s = sum(other.remaining_s for other in others[:place])
    if place == SCAN:
        ahead_s = total_s
    end_s = ahead_s if is_preempting else ahead_s + left_s
    ttft_s, made_late = (end_s + work.remaining_s) * stretch, 0
    if current is not None and is_preempting:
        end_s += left_s
        made_late += _made_late(current, now, end_s, work.remaining_s, stretch)
    for other in others[place:]:
        end_s += other.remaining_s
        made_late += _made_late(other, now, end_s, work.remaining_s, stretch)
    return Outlook(ttft_s, work.remaining_s, made_late)


def _made_late(other: Work, now: float, end_s: float, more_s: float, stretch: float) -> int:
    """Return how many of its jobs are late only because of more_s after end_s."""
    without, with_it = now + end_s * stretch, now + (end_s + more_s) * stretch
    return sum(without <= job.ttft_deadline_s < with_it for job in other.jobs)


def work_s(
    cost_model: CostModel, prompts: Sequence[int], outputs: Sequence[int], max_running: int
) -> float:
    """Return the predicted time of requests that come together on an idle device, seconds.

    Args:
        prompts: tokens of each different prompt.
        outputs: tokens to generate, of each request; at least one request.
        max_running: most sequences in one decode step.
    """
    rows = min(len(outputs), max_running)
    context = rows * (sum(prompts) // len(prompts) + max(outputs) // 2)
    steps = sum(outputs) / rows
    return sum(map(cost_model.prefill_s, prompts)) + steps * cost_model.decode_s(rows, context)
