"""How many requests could be on time if all arrivals were known: a heuristic and a proved bound.

The model is one machine that may be interrupted at any time for free, one request after another,
each with its solo time: 1 | r_j, pmtn | sum U_j. Pure.

`clairvoyant` is a heuristic: what it returns is feasible but may not be the best. It extends the
rule of Moore and Hodgson (Moore, An n job, one machine sequencing algorithm for minimizing the
number of late jobs, Management Science 15, 1968) to release times: schedule by earliest deadline;
at the first job that misses, give up the longest job of the critical interval; repeat. Then each
job given up is tried again, shortest first, and kept if all stay on time. The exact dynamic
programme (Lawler, A dynamic programming algorithm for preemptive scheduling of a single machine to
minimize the number of late jobs, Annals of Operations Research 26, 1990) takes O(n^5) time for
unit weights, too long for hundreds of jobs.

`queue_knowing` does not know what is still to come: at each arrival and end it plans what is there
by Moore and Hodgson's rule, and executes the kept job that is due first. With exact times and free
interruption it is what a scheduler without knowledge of the future can be compared with.

`looking_ahead` lies in between: it knows what arrives within a given time. At each arrival and end,
and whenever an arrival comes into sight, it plans by the heuristic what is there and what it sees,
and executes the kept job that is due first. So it tells what knowledge of the future is worth.

`most_on_time` is an upper bound. Proof: let I = [a, b) be an interval. Jobs with a <= r_j and
d_j <= b that are on time do all their work in I, so their times sum to at most b - a; the most jobs
that fit are those that fit when taken shortest first, m(I) of the n(I). So at least n(I) - m(I) of
them are late. A job lies in at most one of disjoint intervals, so for these the numbers add up. A
dynamic programme over ends of intervals finds the disjoint intervals with the greatest sum. Earlier
or shared completion (packing) cannot break the bound if each time given is at most the machine time
that the job costs at least in any schedule.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flowprefill.traces import TraceRequest

SLACK = 1e-9  # seconds; sums of floats may miss a deadline by rounding


class Timed(NamedTuple):
    """One job: when it is there, when it is due, how long it takes; seconds."""

    release_s: float
    due_s: float
    work_s: float


# jobs, work left of those that are there, those that are seen coming, now -> which to execute
First = Callable[[Sequence[Timed], dict[int, float], Sequence[int], float], int | None]


def jobs_of(requests: Sequence[TraceRequest], work_s: Callable[[int], float]) -> list[Timed]:
    """Return requests as jobs; work_s: prompt tokens -> seconds."""
    return [Timed(one.at_s, one.at_s + one.ttft_s, work_s(one.prompt_tokens)) for one in requests]


def clairvoyant(jobs: Sequence[Timed]) -> set[int]:
    """Return the indices of jobs that can all be on time together (the heuristic)."""
    kept = {n for n, job in enumerate(jobs) if job.work_s <= job.due_s - job.release_s + SLACK}
    given_up: list[int] = []
    while (critical := _critical(jobs, kept)) is not None:
        longest = max(critical, key=lambda n: (jobs[n].work_s, n))
        kept.remove(longest)
        given_up.append(longest)
    for number in sorted(given_up, key=lambda n: (jobs[n].work_s, n)):
        kept.add(number)
        if _critical(jobs, kept) is not None:
            kept.remove(number)
    return kept


def _critical(jobs: Sequence[Timed], kept: set[int]) -> list[int] | None:
    """Schedule by earliest deadline; None if all are on time.

    That schedule meets all deadlines if any does. At the first miss it returns the jobs of the
    critical interval: those due no later than the one that misses, released since the machine was
    last idle or had only later ones to do. Their work exceeds the interval.
    """
    order = sorted(kept, key=lambda n: jobs[n].release_s)
    ready: list[tuple[float, int]] = []
    left = {n: jobs[n].work_s for n in order}
    now, position = 0.0, 0
    while position < len(order) or ready:
        if not ready:
            now = max(now, jobs[order[position]].release_s)
        while position < len(order) and jobs[order[position]].release_s <= now:
            heapq.heappush(ready, (jobs[order[position]].due_s, order[position]))
            position += 1
        due_s, number = ready[0]
        until_s = jobs[order[position]].release_s if position < len(order) else float("inf")
        ends_s = now + left[number]
        if min(ends_s, until_s) > due_s + SLACK:
            return _interval_of(jobs, order, due_s)
        if ends_s <= until_s:
            heapq.heappop(ready)
            now = ends_s
        else:
            left[number] -= until_s - now
            now = until_s
    return None


def _interval_of(jobs: Sequence[Timed], order: Sequence[int], due_s: float) -> list[int]:
    """Return the jobs of the shortest interval that ends at due_s and holds too much work."""
    inside: list[int] = []
    work_s = 0.0
    for number in reversed(order):
        job = jobs[number]
        if job.due_s <= due_s:
            inside.append(number)
            work_s += job.work_s
            if work_s > due_s - job.release_s + SLACK / 2:
                return inside
    raise AssertionError("a deadline was missed, yet no interval holds too much work")


def queue_knowing(jobs: Sequence[Timed]) -> set[int]:
    """Return the indices of jobs that end on time if each moment is planned by what is there."""
    return _executed(jobs, 0.0, _kept_first)


def looking_ahead(jobs: Sequence[Timed], ahead_s: float) -> set[int]:
    """Return the indices of jobs that end on time if all that arrives within ahead_s is known."""
    return _executed(jobs, ahead_s, _planned_first)


def _executed(jobs: Sequence[Timed], ahead_s: float, first: First) -> set[int]:
    """Execute at each moment the job that a plan puts first; return those that end on time.

    It plans anew at each arrival and end, and whenever an arrival comes into sight.
    """
    order = sorted(range(len(jobs)), key=lambda n: jobs[n].release_s)
    left: dict[int, float] = {}
    ended: set[int] = set()
    now, position = 0.0, 0
    while position < len(order) or left:
        seen = position
        while seen < len(order) and jobs[order[seen]].release_s <= now + ahead_s + SLACK:
            seen += 1
        for number in [n for n, work_s in left.items() if now + work_s > jobs[n].due_s + SLACK]:
            del left[number]
        planned = first(jobs, left, order[position:seen], now)
        next_s = jobs[order[position]].release_s if position < len(order) else float("inf")
        if seen < len(order):
            next_s = min(next_s, max(jobs[order[seen]].release_s - ahead_s, now + SLACK))
        if planned is not None and now + left[planned] <= next_s:
            now += left.pop(planned)
            ended.add(planned)
            continue
        if position == len(order):  # nothing is left that can be on time
            return ended
        if planned is not None:
            left[planned] -= max(next_s - now, 0.0)
        now = max(now, next_s)
        while position < len(order) and jobs[order[position]].release_s <= now:
            left[order[position]] = jobs[order[position]].work_s
            position += 1
    return ended


def _kept_first(
    jobs: Sequence[Timed], left: dict[int, float], _coming: Sequence[int], now: float
) -> int | None:
    """Plan by Moore and Hodgson's rule; return the kept job that is due first."""
    ends_s = now
    kept: list[tuple[float, int]] = []  # a heap, the longest first
    for number in sorted(left, key=lambda n: (jobs[n].due_s, n)):
        heapq.heappush(kept, (-left[number], number))
        ends_s += left[number]
        if ends_s > jobs[number].due_s + SLACK:
            ends_s += heapq.heappop(kept)[0]
    return min((n for _, n in kept), key=lambda n: (jobs[n].due_s, n), default=None)


def _planned_first(
    jobs: Sequence[Timed], left: dict[int, float], coming: Sequence[int], now: float
) -> int | None:
    """Plan by the heuristic; return the kept job of those there that is due first.

    If none there is kept, the shortest: the time would be lost.
    """
    here = list(left)
    kept = clairvoyant(
        [Timed(now, jobs[n].due_s, left[n]) for n in here] + [jobs[n] for n in coming]
    )
    planned = [here[n] for n in kept if n < len(here)]
    if planned:
        return min(planned, key=lambda n: (jobs[n].due_s, n))
    return min(here, key=lambda n: (left[n], n), default=None)


def most_on_time(jobs: Sequence[Timed]) -> int:
    """Return a number that the jobs on time in no schedule exceed (proof: see the file's head).

    Cost: O(n^3) in the worst case; for a few hundred jobs.
    """
    possible = [job for job in jobs if job.work_s <= job.due_s - job.release_s + SLACK]
    hopeless = len(jobs) - len(possible)
    by_due = sorted(possible, key=lambda job: job.due_s)
    starts = sorted({job.release_s for job in possible})
    ends = sorted({job.due_s for job in possible})
    # late[i]: the most late jobs that disjoint intervals within [.., ends[i]] force.
    late = [0] * (len(ends) + 1)
    forced = [dict(_forced(by_due, start_s)) for start_s in starts]
    for index, end_s in enumerate(ends):
        best = late[index]
        for start_s, of_start in zip(starts, forced, strict=True):
            if start_s >= end_s:
                break
            more = of_start.get(end_s, 0)
            if more:
                best = max(best, late[bisect_right(ends, start_s)] + more)
        late[index + 1] = best
    return len(jobs) - hopeless - late[-1]


def _forced(by_due: Sequence[Timed], start_s: float) -> list[tuple[float, int]]:
    """Return for each deadline how many jobs of [start_s, deadline] must be late, if any."""
    works: list[float] = []
    found = []
    total_s = 0.0
    for job in by_due:
        if job.release_s < start_s:
            continue
        insort(works, job.work_s)
        total_s += job.work_s
        room_s = job.due_s - start_s + SLACK
        excess_s, count = total_s - room_s, 0
        while excess_s > 0:  # leave out the longest first: that is, keep the shortest
            count += 1
            excess_s -= works[-count]
        if count:
            found.append((job.due_s, count))
    return found
