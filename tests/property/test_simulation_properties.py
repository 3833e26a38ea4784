"""What holds of every simulation, whatever arrives: conservation, one run at a time, the bound."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowprefill.config import POLICIES, Granularity
from flowprefill.simulation import Configuration, Profile, Result, WorkCosts, simulate
from flowprefill.simulation.node import ROLES, Role
from flowprefill.traces import TraceRequest

PROFILE = Profile.load("llama-3.1-8b@a100")
GRANULARITIES = ("none", "layer", "operator", "chunk:512", "budget:2")
MOST_TOKENS = 6_000
COSTS = {text: WorkCosts(PROFILE, Granularity.parse(text)) for text in GRANULARITIES}


@st.composite
def traces(draw: st.DrawFn) -> list[TraceRequest]:
    requests, at_s = [], 0.0
    for _ in range(draw(st.integers(1, 20))):
        at_s += draw(st.sampled_from([0.0, 0.003, 0.05, 0.4]))
        tokens = draw(st.sampled_from([1, 90, 700, MOST_TOKENS]))
        ttft_s = draw(st.sampled_from([0.01, 0.25, 4.0, math.inf]))
        tpot_s = draw(st.sampled_from([0.02, 0.1, math.inf]))
        requests.append(TraceRequest(at_s, tokens, draw(st.integers(1, 5)), "", ttft_s, tpot_s))
    return requests


def play(trace: list[TraceRequest], policy: str, cut: str, role: Role, seed: int) -> Result:
    return simulate(
        trace, Configuration(policy, Granularity.parse(cut)), PROFILE, seed=seed, noise=0.2,
        role=role, costs=COSTS[cut], keep_stretches=True,
    )  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
@settings(max_examples=60)
@given(
    trace=traces(),
    policy=st.sampled_from(POLICIES),
    cut=st.sampled_from(GRANULARITIES),
    seed=st.integers(0, 100),
)
def test_simulation_each_request_ends_once_and_one_run_executes(
    trace: list[TraceRequest], policy: str, cut: str, role: Role, seed: int
) -> None:
    result = play(trace, policy, cut, role, seed)
    assert [outcome.number for outcome in result.outcomes] == list(range(len(trace)))
    for outcome in result.outcomes:
        assert outcome.request.at_s <= outcome.finished_s < math.inf
        assert 0.0 <= outcome.ttft_s < math.inf
    end_s = 0.0
    for stretch in result.stretches:
        assert end_s <= stretch.start_s <= stretch.end_s
        end_s = stretch.end_s
    assert all(stretch.run.state == "finished" for stretch in result.stretches)
    executed_s = sum({s.run.id: s.run.total_s for s in result.stretches}.values())
    assert result.busy_s == pytest.approx(executed_s)
    assert result.busy_s <= result.span_s + 1e-9


@settings(max_examples=60)
@given(
    trace=traces(),
    policy=st.sampled_from(POLICIES),
    cut=st.sampled_from(GRANULARITIES),
    role=st.sampled_from(ROLES),
    seed=st.integers(0, 100),
)
def test_simulation_blocking_is_at_most_the_longest_segment(
    trace: list[TraceRequest], policy: str, cut: str, role: Role, seed: int
) -> None:
    result = play(trace, policy, cut, role, seed)
    longest_s = 0.0
    for run in {stretch.run for stretch in result.stretches}:
        bounds = run.bounds()
        shares = (after - before for before, after in zip([0.0, *bounds], bounds, strict=False))
        longest_s = max(longest_s, run.total_s * max(shares))
    assert all(0.0 <= seconds <= longest_s * 1.001 + 1e-9 for seconds in result.blocking_s)
    assert result.preemptions <= len(result.blocking_s)


@settings(max_examples=30)
@given(trace=traces(), cut=st.sampled_from(GRANULARITIES), seed=st.integers(0, 100))
def test_simulation_same_seed_same_result(trace: list[TraceRequest], cut: str, seed: int) -> None:
    first, second = (play(trace, "slack_edf", cut, "mixed", seed) for _ in range(2))
    assert first.outcomes == second.outcomes
    assert first.blocking_s == second.blocking_s
