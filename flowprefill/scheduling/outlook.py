"""Outlook: what one more job would mean to itself and to the others; the scheduler makes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

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
        made_late: admitted jobs that meet their deadline without it and miss it with it; and those
            promised to be on time that miss even the deadline that was made anew for them.
        clear_s: in how many seconds one like it would make none late, if no other comes.
        margin_s: by how much sooner than its deadline a first token is to be predicted.
    """

    ttft_s: float
    alone_s: float
    made_late: int
    clear_s: float = 0.0
    margin_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an outlook has to know of what the scheduler does not decide.

    Attributes:
        stretch: how many times longer works take because of decode steps in between.
        margin_s: by how much sooner than a promised deadline its first token is to be predicted,
            were predictions exact.
        spread: how much longer than predicted one in ten works takes, as a share of its time.
        most_spread_s: most that is kept free for that.
        elsewhere_s: predicted time of prefills that wait elsewhere; they count as ahead.
    """

    stretch: float = 1.0
    margin_s: float = 0.0
    spread: float = 0.0
    most_spread_s: float = math.inf
    elsewhere_s: float = 0.0


@dataclass(slots=True)
class _Harm:
    """What the newcomer would do to those behind it."""

    now: float
    more_s: float
    around: Surroundings
    squares: float  # sum of the squares of the times that are ahead
    made_late: int = 0
    last_end_s: float = 0.0  # from now on, without the newcomer; of the last made late
    last_deadline_s: float = 0.0

    def margin_s(self) -> float:
        """Return what to keep free before a deadline, for works whose errors are independent."""
        spread_s = self.around.spread * math.sqrt(self.squares)
        return self.around.margin_s + min(spread_s, self.around.most_spread_s)

    def weigh(self, other: Work, without_s: float, with_s: float) -> None:
        """Count its jobs that are late because of the newcomer, by its ends without it and with it.

        Args:
            without_s, with_s: from now on, unstretched.
        """
        without = self.now + without_s * self.around.stretch
        with_it = self.now + with_s * self.around.stretch
        self.squares += other.remaining_s**2
        if other.is_promised:
            made_late = len(other.jobs) if with_it + self.margin_s() > other.deadline_s else 0
        else:
            made_late = sum(without <= job.ttft_deadline_s < with_it for job in other.jobs)
        if made_late:
            self.made_late += made_late
            self.last_end_s = without_s * self.around.stretch
            self.last_deadline_s = other.deadline_s

    def clear_s(self, deadline_s: float) -> float:
        """Return when one like it, with the deadline later by so much, comes behind the last."""
        if not self.made_late:
            return 0.0
        objective_s = deadline_s - self.now
        passes_s = self.last_deadline_s - deadline_s
        fits_s = self.last_end_s + self.more_s * self.around.stretch + self.margin_s() - objective_s
        return min(max(passes_s, fits_s, 0.0), self.last_end_s)


def outlook_of(
    work: Work,
    current: Work | None,
    waiting: Iterable[Work],
    total_s: float,
    policy: Policy,
    now: float,
    around: Surroundings,
) -> Outlook:
    """Lay all works out in the order in which they would run, with the new one and without.

    Changes nothing.

    Args:
        work: the job's, in no queue, its serial below 0.
        current: what runs, accounted for up to now.
        waiting: the others, most urgent first. Beyond SCAN of them the rest counts as ahead.
        total_s: predicted time of all that wait.

    Cost: O(k log k) for k = min(SCAN, works waiting).
    """
    work.rank = policy.rank(work, now)
    policy.left(work)
    mine = (work.rank.key, work.priority)
    left_s = current.remaining_s if current is not None else 0.0
    is_preempting = current is not None and policy.should_preempt(current, [work], now).preempt
    others = list(islice(waiting, SCAN))
    place = next((i for i, o in enumerate(others) if mine < (o.rank.key, o.priority)), len(others))
    without = dict(_ends(policy.course(others, now + left_s), left_s))
    behind = [work]
    start_s = left_s
    if current is not None and is_preempting:
        start_s = 0.0
        without[current] = left_s
        behind.append(current)
    course = list(policy.course([*others[:place], *behind, *others[place:]], now + start_s))
    mine_at = course.index(work)
    ahead_s = [other.remaining_s for other in course[:mine_at]]
    if start_s:
        ahead_s.append(left_s)
    end_s = sum(ahead_s)
    if place == SCAN:
        end_s = max(total_s + start_s, end_s)
    ttft_s = (end_s + around.elsewhere_s + work.remaining_s) * around.stretch
    harm = _Harm(now, work.remaining_s, around, sum(seconds**2 for seconds in ahead_s))
    margin_s = harm.margin_s()
    harm.squares += work.remaining_s**2
    for other, with_s in _ends(course[mine_at + 1 :], end_s + work.remaining_s):
        if not other.is_decode:  # its jobs have their first token
            harm.weigh(other, without[other], with_s)
    clear_s = harm.clear_s(work.deadline_s)
    return Outlook(ttft_s, work.remaining_s, harm.made_late, clear_s, margin_s)


def _ends(works: Iterable[Work], start_s: float) -> Iterator[tuple[Work, float]]:
    """Yield each with when it ends, one after another from a time on."""
    for work in works:
        start_s += work.remaining_s
        yield work, start_s


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
