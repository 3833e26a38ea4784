"""simulate: outcomes of small traces that can be worked out by hand, and what a Result tells."""

from __future__ import annotations

import math

import pytest

from flowprefill.config import Granularity
from flowprefill.errors import ConfigError
from flowprefill.scheduling import SchedulerSettings
from flowprefill.simulation import Configuration, Profile, WorkCosts, simulate
from flowprefill.traces import TraceRequest

PROFILE = Profile.load("llama-3.1-8b@h100")
OURS = Configuration("slack_edf", Granularity.parse("budget:2"))


def test_simulate_one_request_takes_the_time_of_its_prefill() -> None:
    result = simulate([TraceRequest(3.0, 2000, 5, "text", 1.0)], OURS, PROFILE)
    (outcome,) = result.outcomes
    expected = WorkCosts(PROFILE, OURS.granularity).prefill_s(2000, 2000 * 2001 / 2)
    assert outcome.ttft_s == pytest.approx(expected)
    assert outcome.finished_s == pytest.approx(3.0 + expected)
    assert outcome.is_on_time
    assert result.busy_s == pytest.approx(expected)
    assert result.utilisation == pytest.approx(1.0)


def test_simulate_urgent_request_preempts_a_long_one_within_one_segment() -> None:
    trace = [TraceRequest(0.0, 30_000, ttft_s=20.0), TraceRequest(0.2, 200, ttft_s=0.1)]
    result = simulate(trace, OURS, PROFILE)
    long, short = result.outcomes
    assert (long.preemptions, short.preemptions) == (1, 0)
    assert result.blocking_s == [short.blocking_s]
    assert short.blocking_s < 4e-3
    assert short.is_on_time
    assert long.is_on_time
    assert long.suspended_s == pytest.approx(short.ttft_s - short.blocking_s)
    fcfs = simulate(trace, Configuration("fcfs", Granularity("none")), PROFILE)
    assert not fcfs.outcomes[1].is_on_time
    assert fcfs.outcomes[1].ttft_s > long.ttft_s - 0.3


def test_simulate_decode_steps_give_every_token_and_keep_the_pace() -> None:
    trace = [TraceRequest(0.0, 500, 20, "text", 1.0, 0.05), TraceRequest(0.1, 500, 1)]
    result = simulate(trace, OURS, PROFILE, role="mixed")
    talker, other = result.outcomes
    step = WorkCosts(PROFILE, OURS.granularity).decode_s(1, 500)
    assert step < talker.mean_itl_s < 0.05
    assert other.mean_itl_s == 0.0
    assert talker.finished_s - talker.ttft_s == pytest.approx(19 * talker.mean_itl_s)


def test_simulate_decode_worker_starts_with_the_first_token() -> None:
    trace = [TraceRequest(0.0, 4000, 11), TraceRequest(0.5, 10, 1)]
    result = simulate(trace, OURS, PROFILE, role="decode")
    step = WorkCosts(PROFILE, OURS.granularity).decode_s(1, 4005)
    assert result.outcomes[0].finished_s == pytest.approx(10 * step, rel=1e-3)
    assert result.outcomes[1].finished_s == 0.5


def test_simulate_chunks_cost_a_run_and_the_weights_each() -> None:
    trace = [TraceRequest(0.0, 8192)]
    seconds = {
        text: simulate(trace, Configuration("fcfs", Granularity.parse(text)), PROFILE).busy_s
        for text in ("none", "chunk:2048", "chunk:512", "chunk:32")
    }
    overhead = PROFILE.rates.run_overhead_s
    assert seconds["chunk:2048"] > seconds["none"] + 2.5 * overhead
    assert seconds["chunk:512"] > seconds["chunk:2048"] + 11 * overhead
    weights = PROFILE.shape.weight_bytes / PROFILE.rates.weight_bytes_per_s
    assert seconds["chunk:32"] > 8192 / 32 * (weights + overhead)


def test_simulate_noise_is_the_requests_own_whatever_the_policy() -> None:
    trace = [TraceRequest(10.0 * n, 3000) for n in range(200)]
    runs = [
        simulate(trace, Configuration(policy), PROFILE, seed=5, noise=0.3)
        for policy in ("fcfs", "slack_edf")
    ]
    times = [[outcome.ttft_s for outcome in run.outcomes] for run in runs]
    assert times[0] == pytest.approx(times[1])
    plain = simulate(trace[:1], OURS, PROFILE).busy_s
    assert sum(times[0]) / 200 == pytest.approx(plain, rel=0.08)
    logs = [math.log(seconds) for seconds in times[0]]
    spread = math.sqrt(sum((x - sum(logs) / 200) ** 2 for x in logs) / 200)
    assert spread == pytest.approx(0.3, rel=0.15)


def test_simulate_bias_changes_predictions_not_the_truth() -> None:
    trace = [TraceRequest(10.0 * n, 3000) for n in range(3)]
    plain, doubled = (simulate(trace, OURS, PROFILE, bias=bias).busy_s for bias in (1.0, 2.0))
    assert plain == doubled


def test_simulate_hopeless_requests_are_dropped_where_wanted() -> None:
    trace = [TraceRequest(0.0, 30_000), TraceRequest(0.0, 30_000, ttft_s=1.1)]
    none = Configuration("fcfs", Granularity("none"))
    kept = simulate(trace, none, PROFILE).outcomes
    first, dropped = simulate(trace, none, PROFILE, on_miss="drop").outcomes
    assert first.ttft_s == kept[0].ttft_s
    assert (dropped.end, dropped.ttft_s, dropped.is_on_time) == ("dropped", math.inf, False)
    assert dropped.finished_s < 1.1 < kept[1].ttft_s


def test_simulate_settings_given_are_taken_as_they_are() -> None:
    settings = SchedulerSettings(max_blocking_s=0.5)
    assert Configuration(settings=settings).scheduler(PROFILE).settings == settings
    assert OURS.scheduler(PROFILE).settings.max_blocking_s == pytest.approx(2e-3)
    assert OURS.name == "slack_edf+budget:2"


def test_simulate_keeps_decisions_and_stretches_when_asked() -> None:
    trace = [TraceRequest(0.0, 30_000), TraceRequest(0.2, 200, ttft_s=0.1)]
    result = simulate(trace, OURS, PROFILE, keep_decisions=3, keep_stretches=True)
    assert len(result.decisions) == 3
    assert [stretch.run.id for stretch in result.stretches] == [1, 2, 1]
    assert sum(s.end_s - s.start_s for s in result.stretches) == pytest.approx(result.busy_s)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -1.0}, "noise: got -1.0"),
        ({"noise": math.nan}, "noise: got nan"),
        ({"bias": 0.0}, "bias: got 0.0"),
        ({"role": "prefil"}, "role: got 'prefil'"),
    ],
)
def test_simulate_bad_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate([TraceRequest(0.0, 1)], OURS, PROFILE, **options)  # type: ignore[arg-type]


def test_simulate_arrivals_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"one at 1.0 s comes after one at 2.0 s"):
        simulate([TraceRequest(2.0, 1), TraceRequest(1.0, 1)], OURS, PROFILE)


def test_result_of_nothing_has_no_attainment() -> None:
    result = simulate([], OURS, PROFILE)
    assert math.isnan(result.attainment)
    assert result.utilisation == 0.0
    assert math.isnan(result.ttft_quantile(0.5))
