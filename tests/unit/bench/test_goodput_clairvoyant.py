"""The clairvoyant heuristic is feasible, its bound is a bound, and both are exact where known."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from flowprefill.bench.goodput.clairvoyant import (
    Timed,
    clairvoyant,
    jobs_of,
    looking_ahead,
    most_on_time,
    queue_knowing,
)
from flowprefill.traces import TraceRequest


def is_feasible(jobs: Sequence[Timed]) -> bool:
    """Tell whether all can be on time: each interval must hold the work that lies in it."""
    for start_s, end_s in itertools.product(
        {job.release_s for job in jobs}, {job.due_s for job in jobs}
    ):
        inside = [job for job in jobs if job.release_s >= start_s and job.due_s <= end_s]
        if inside and sum(job.work_s for job in inside) > end_s - start_s + 1e-9:
            return False
    return True


def best_of_all(jobs: Sequence[Timed]) -> int:
    """Return the greatest number that can be on time, by trying every subset."""
    for count in range(len(jobs), 0, -1):
        if any(is_feasible(chosen) for chosen in itertools.combinations(jobs, count)):
            return count
    return 0


def random_jobs(seed: int, count: int, horizon_s: float = 6.0) -> list[Timed]:
    rng = random.Random(seed)
    jobs = []
    for _ in range(count):
        release_s, work_s = rng.uniform(0, horizon_s), rng.choice([0.1, 0.4, 1.0, 2.5])
        jobs.append(Timed(release_s, release_s + work_s * rng.uniform(0.8, 4.0), work_s))
    return jobs


@pytest.mark.parametrize("seed", range(60))
def test_heuristic_and_bound_enclose_the_best(seed: int) -> None:
    jobs = random_jobs(seed, 9)
    kept = clairvoyant(jobs)
    best = best_of_all(jobs)
    assert is_feasible([jobs[n] for n in kept])
    assert len(kept) <= best <= most_on_time(jobs)


@pytest.mark.parametrize("seed", range(60))
def test_queue_knowing_is_feasible_and_never_better_than_the_best(seed: int) -> None:
    jobs = random_jobs(seed, 9)
    ended = queue_knowing(jobs)
    assert is_feasible([jobs[n] for n in ended])
    assert len(ended) <= best_of_all(jobs)


def test_queue_knowing_gives_up_what_it_could_not_foresee() -> None:
    # It begins the long job; the two that come later fit only if it had not.
    jobs = [Timed(0.0, 3.0, 3.0), Timed(1.0, 2.0, 1.0), Timed(2.0, 3.0, 1.0)]
    assert queue_knowing(jobs) == {1, 2}
    tight = [Timed(0.0, 2.0, 2.0), Timed(1.0, 2.2, 1.2)]
    assert len(queue_knowing(tight)) == 1


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("ahead_s", [0.0, 0.5, 2.0])
def test_looking_ahead_is_feasible_and_never_better_than_the_best(
    seed: int, ahead_s: float
) -> None:
    jobs = random_jobs(seed, 9)
    ended = looking_ahead(jobs, ahead_s)
    assert is_feasible([jobs[n] for n in ended])
    assert len(ended) <= best_of_all(jobs)


def test_looking_ahead_keeps_more_the_further_it_sees() -> None:
    def mean(ahead_s: float) -> float:
        return sum(len(looking_ahead(random_jobs(n, 40, 20.0), ahead_s)) for n in range(20)) / 20

    all_known = sum(len(clairvoyant(random_jobs(n, 40, 20.0))) for n in range(20)) / 20
    blind, some, all_seen = mean(0.0), mean(1.0), mean(100.0)
    assert blind < some < all_seen
    assert all_seen == pytest.approx(all_known, rel=0.02)


def test_looking_ahead_gives_up_only_what_it_sees_no_room_for() -> None:
    # The first long job fits; with the two that come the second does not.
    jobs = [Timed(0.0, 3.0, 3.0), Timed(1.0, 2.0, 1.0), Timed(2.0, 3.0, 1.0), Timed(0.0, 1.0, 0.9)]
    assert looking_ahead(jobs, 2.0) == {1, 2, 3}


def test_heuristic_is_near_the_best_on_the_mean() -> None:
    seeds = range(60)
    best = sum(best_of_all(random_jobs(seed, 9)) for seed in seeds)
    assert sum(len(clairvoyant(random_jobs(seed, 9))) for seed in seeds) >= 0.97 * best
    assert sum(most_on_time(random_jobs(seed, 9)) for seed in seeds) <= 1.12 * best


@pytest.mark.parametrize("seed", range(10))
def test_equal_releases_are_solved_exactly(seed: int) -> None:
    # Without release times the rule is Moore and Hodgson's, which is optimal.
    jobs = [Timed(0.0, job.due_s, job.work_s) for job in random_jobs(seed, 9)]
    assert len(clairvoyant(jobs)) == len(queue_knowing(jobs)) == best_of_all(jobs)


@pytest.mark.parametrize("seed", range(5))
def test_many_jobs_stay_feasible_and_below_the_bound(seed: int) -> None:
    jobs = random_jobs(seed, 120, horizon_s=60.0)
    kept = clairvoyant(jobs)
    assert is_feasible([jobs[n] for n in kept])
    assert len(kept) <= most_on_time(jobs)


def test_jobs_that_do_not_fit_alone_are_never_kept() -> None:
    jobs = [Timed(0.0, 1.0, 1.5), Timed(0.0, 2.0, 1.5)]
    assert clairvoyant(jobs) == {1}
    assert most_on_time(jobs) == 1


def test_best_effort_requests_are_always_on_time() -> None:
    jobs = jobs_of([TraceRequest(0.0, 100), TraceRequest(0.0, 100, ttft_s=0.5)], lambda n: n / 200)
    assert clairvoyant(jobs) == {0, 1}
    assert most_on_time(jobs) == 2
