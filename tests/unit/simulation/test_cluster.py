"""simulate_cluster and its routers: conservation, bounded counts, and who goes where."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest

from flowprefill.config import Granularity
from flowprefill.errors import ConfigError
from flowprefill.simulation import Configuration, Outcome, Profile, simulate, simulate_cluster
from flowprefill.simulation.digest import Digest
from flowprefill.simulation.routers import ROUTERS
from flowprefill.traces import TraceRequest

PROFILE = Profile.load("llama-3.1-8b@h100")
OURS = Configuration()


def trace(count: int, rate_rps: float, seed: int = 1) -> Iterator[TraceRequest]:
    rng = random.Random(seed)
    at_s = 0.0
    for _ in range(count):
        at_s += rng.expovariate(rate_rps)
        tokens, ttft_s = rng.choice(((300, 0.2), (300, 0.2), (1_000, 0.5), (9_000, 3.0)))
        yield TraceRequest(at_s, tokens, 3, f"{tokens}", ttft_s)


@pytest.mark.parametrize("router", ROUTERS)
def test_cluster_every_request_ends_once(router: str) -> None:
    ended: list[Outcome] = []
    result = simulate_cluster(trace(400, 60.0), 5, router, OURS, PROFILE, on_end=ended.append)
    assert sorted(outcome.number for outcome in ended) == list(range(400))
    assert {outcome.worker for outcome in ended} == set(range(5))
    assert result.whole.requests == 400
    assert sum(counts.requests for counts in result.classes.values()) == 400
    assert result.whole.on_time == sum(outcome.is_on_time for outcome in ended)
    assert 0 < result.utilisation <= 1
    for worker in range(5):
        assert result.busy_s[worker] <= result.span_s


def test_cluster_of_one_is_simulate() -> None:
    alone = simulate(trace(200, 12.0), OURS, PROFILE, noise=0.2, seed=3)
    result = simulate_cluster(trace(200, 12.0), 1, "round_robin", OURS, PROFILE, noise=0.2, seed=3)
    assert result.whole.attainment == alone.attainment
    assert result.busy_s == [alone.busy_s]
    assert (result.events, result.preemptions) == (alone.events, alone.preemptions)
    assert result.whole.ttft.quantile(0.5) == pytest.approx(alone.ttft_quantile(0.5), rel=0.01)
    assert result.blocking.max == max(alone.blocking_s)
    assert result.span_s == pytest.approx(alone.span_s)


@pytest.mark.parametrize("router", ROUTERS)
def test_cluster_same_seed_same_result(router: str) -> None:
    first, second = (
        simulate_cluster(trace(200, 60.0), 4, router, OURS, PROFILE, seed=9, noise=0.1)
        for _ in range(2)
    )
    assert first.busy_s == second.busy_s
    assert first.whole.on_time == second.whole.on_time


def test_routers_that_look_lose_fewer_than_round_robin() -> None:
    fcfs = Configuration("fcfs", Granularity("none"))
    attained = {
        router: simulate_cluster(trace(3000, 75.0), 6, router, fcfs, PROFILE).whole.attainment
        for router in ROUTERS
    }
    for router in ("least_tokens", "least_finish", "two_choices"):
        assert attained[router] > attained["round_robin"] + 0.05, attained


def test_cluster_of_decode_workers_gives_every_token() -> None:
    ended: list[Outcome] = []
    requests = [TraceRequest(0.01 * n, 1000, 20, "", 1.0, 0.05) for n in range(50)]
    result = simulate_cluster(
        requests, 3, "least_tokens", OURS, PROFILE, role="decode", on_end=ended.append
    )
    assert result.whole.on_time == 50
    assert all(0 < outcome.mean_itl_s < 0.05 for outcome in ended)


@pytest.mark.parametrize(
    ("workers", "router", "role", "message"),
    [
        (0, "round_robin", "prefill", "workers: got 0"),
        (2, "nearest", "prefill", "router: got 'nearest'"),
        (2, "two_choices", "decode", "predicts first tokens"),
    ],
)
def test_cluster_bad_value_is_named(workers: int, router: str, role: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate_cluster([], workers, router, OURS, PROFILE, role=role)  # type: ignore[arg-type]


def test_cluster_arrivals_out_of_order_are_refused() -> None:
    requests = [TraceRequest(2.0, 1), TraceRequest(1.0, 1)]
    with pytest.raises(ConfigError, match=r"one at 1.0 s comes after one at 2.0 s"):
        simulate_cluster(requests, 2, "round_robin", OURS, PROFILE)


def test_digest_quantiles_are_right_within_one_per_cent() -> None:
    rng = random.Random(4)
    values = [rng.lognormvariate(0.0, 3.0) for _ in range(5000)]
    digest = Digest()
    for value in values:
        digest.add(value)
    values.sort()
    for q in (0.01, 0.5, 0.9, 0.999):
        exact = values[math.ceil(q * 5000) - 1]
        assert exact <= digest.quantile(q) * 1.0001 <= exact * 1.0102
    assert digest.quantile(1.0) == values[-1] == digest.max


def test_digest_zero_inf_and_nothing() -> None:
    digest = Digest()
    assert math.isnan(digest.quantile(0.5))
    for value in (0.0, 0.0, math.inf):
        digest.add(value)
    assert digest.quantile(0.5) == 0.0
    assert digest.quantile(0.9) == math.inf
