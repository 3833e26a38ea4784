"""Transforms of traces, objectives on them, and the generator."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from flowprefill.errors import ConfigError
from flowprefill.traces import (
    Trace,
    TraceRequest,
    at_rate,
    built_in_maps,
    clipped,
    for_machine,
    load_objectives,
    objectives_for,
    prefill_only,
    resampled,
    resampled_requests,
    scaled_lengths,
    scaled_objectives,
    scaled_rate,
    synthetic_trace,
    window,
    with_objectives,
)
from flowprefill.traces.synthetic import CLASSES, RATE_RPS

TIMES_S = (0.0, 0.1, 0.2, 4.0, 9.0)
TRACE = Trace("t", tuple(TraceRequest(at_s, 100 * (n + 1), 10) for n, at_s in enumerate(TIMES_S)))


def times(trace: Trace) -> list[float]:
    return [one.at_s for one in trace.requests]


def prompts(trace: Trace) -> list[int]:
    return [one.prompt_tokens for one in trace.requests]


def gap_variation(trace: Trace) -> float:
    """Coefficient of variation of the gaps: what a scaling of the rate must keep."""
    gaps = [b - a for a, b in zip(times(trace), times(trace)[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    return float((sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean)


def test_scaled_rate_divides_gaps_and_keeps_burstiness() -> None:
    faster = scaled_rate(TRACE, 4.0)
    assert times(faster) == pytest.approx([0.0, 0.025, 0.05, 1.0, 2.25])
    assert faster.rate_rps == pytest.approx(4 * TRACE.rate_rps)
    assert gap_variation(faster) == pytest.approx(gap_variation(TRACE))


def test_at_rate_reaches_the_rate() -> None:
    assert at_rate(TRACE, 3.5).rate_rps == pytest.approx(3.5)
    with pytest.raises(ValueError, match="arrive at once"):
        at_rate(Trace("t", (TraceRequest(0, 1), TraceRequest(0, 1))), 1.0)


def test_lengths_are_scaled_and_never_zero() -> None:
    scaled = scaled_lengths(TRACE, 0.004)
    assert prompts(scaled) == [1, 1, 1, 2, 2]
    assert {one.output_tokens for one in scaled.requests} == {1}


def test_clipping_keeps_room_for_the_output() -> None:
    for one in clipped(TRACE, 205).requests:
        assert one.prompt_tokens + one.output_tokens <= 205
    assert prompts(clipped(TRACE, 205)) == [100, 195, 195, 195, 195]
    assert clipped(TRACE, 5).requests[0] == TraceRequest(0.0, 1, 4)


def test_window_is_shifted_to_zero() -> None:
    assert times(window(TRACE, 0.15, 4.0)) == pytest.approx([0.05, 3.85])
    with pytest.raises(ValueError, match="no requests"):
        window(TRACE, 5.0, 1.0)


def test_prefill_only_drops_outputs_and_their_objective() -> None:
    trace = prefill_only(Trace("t", (TraceRequest(0, 5, 9, "c", 1.0, 0.1),)))
    assert trace.requests == (TraceRequest(0, 5, 1, "c", 1.0),)


@pytest.mark.parametrize("seed", range(20))
def test_resample_keeps_span_and_blocks(seed: int) -> None:
    trace = synthetic_trace(3, 400)
    sample = resampled(trace, seed, 10.0)
    assert sample == resampled(trace, seed, 10.0)
    assert sample != resampled(trace, seed + 1, 10.0)
    assert times(sample) == sorted(times(sample))
    assert times(sample)[-1] <= trace.span_s
    assert {(one.prompt_tokens, one.service_class) for one in sample.requests} <= {
        (one.prompt_tokens, one.service_class) for one in trace.requests
    }
    # Neighbours inside a block stay neighbours, with their gap.
    gaps = Counter(round(b - a, 9) for a, b in zip(times(trace), times(trace)[1:], strict=False))
    kept = [round(b - a, 9) for a, b in zip(times(sample), times(sample)[1:], strict=False)]
    assert sum(gap in gaps for gap in kept) > 0.9 * len(kept)


def test_resamples_have_the_rate_of_the_trace_on_the_mean() -> None:
    trace = synthetic_trace(3, 400)
    counts = [len(resampled(trace, seed).requests) for seed in range(200)]
    assert sum(counts) / 200 == pytest.approx(400, rel=0.03)


def test_a_resample_may_be_longer_than_the_trace() -> None:
    trace = synthetic_trace(3, 400)
    sample = resampled(trace, 1, span_s=20 * trace.span_s)
    assert len(sample.requests) == pytest.approx(20 * 400, rel=0.05)
    assert 19.9 * trace.span_s < times(sample)[-1] <= 20 * trace.span_s


def test_resamples_of_what_arrives_at_once_are_that() -> None:
    trace = Trace("t", (TraceRequest(0.0, 5, 1), TraceRequest(0.0, 6, 1)))
    assert resampled(trace, 1) == trace


@pytest.mark.parametrize("block", [1, 16, 1000])
def test_resample_by_requests_keeps_their_number(block: int) -> None:
    trace = synthetic_trace(3, 100)
    sample = resampled_requests(trace, 5, block)
    assert sample == resampled_requests(trace, 5, block)
    assert len(sample.requests) == 100
    assert times(sample)[0] == 0.0
    assert times(sample) == sorted(times(sample))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_factors_out_of_range_are_refused(value: float) -> None:
    for transform in (scaled_rate, scaled_lengths, at_rate):
        with pytest.raises(ValueError, match="expected a number > 0"):
            transform(TRACE, value)


def test_synthetic_trace_has_the_statistics_it_says() -> None:
    trace = synthetic_trace(7, 6000)
    assert trace == synthetic_trace(7, 6000)
    assert trace.rate_rps == pytest.approx(RATE_RPS, rel=0.05)
    assert gap_variation(trace) == pytest.approx(1.0, abs=0.05)
    assert sum(prompts(trace)) / 6000 == pytest.approx(1634.5, rel=0.05)
    counts = Counter(one.service_class for one in trace.requests)
    for name, weight in CLASSES.items():
        assert counts[name] / 6000 == pytest.approx(weight / 327, abs=0.02)


def test_objectives_of_classes_are_scaled() -> None:
    trace = Trace("t", (TraceRequest(0, 5, 1, "text"), TraceRequest(0, 5, 1, "file")))
    first, second = with_objectives(trace, load_objectives("qwen-8b"), 0.5).requests
    assert (first.ttft_s, first.tpot_s, second.ttft_s) == (0.125, 0.05, 3.0)


def test_own_objectives_are_scaled() -> None:
    trace = scaled_objectives(Trace("t", (TraceRequest(0, 5, 1, "c", 1.0, 0.1),)), 0.5)
    assert trace.requests == (TraceRequest(0, 5, 1, "c", 0.5, 0.05),)


def test_objectives_by_length_give_each_prompt_a_class() -> None:
    trace = Trace("t", tuple(TraceRequest(0, tokens) for tokens in (3000, 3001, 20_000, 90_000)))
    objectives = objectives_for(trace)
    assert objectives.name == "length-8b"
    named = with_objectives(trace, objectives).requests
    assert [one.service_class for one in named] == ["text", "search", "file", "document"]


@pytest.mark.parametrize("name", built_in_maps())
def test_built_in_maps_load(name: str) -> None:
    objectives = load_objectives(name)
    assert objectives.source
    assert all(one.ttft_s > 0 for one in objectives.classes.values())


def test_objectives_are_carried_by_the_ratio_of_solo_times() -> None:
    paper = load_objectives("qwen-8b")
    same = for_machine(paper, lambda tokens: tokens * paper.solo_s_per_token)
    assert same.classes["file"].ttft_s == pytest.approx(6.0)
    slower = for_machine(paper, lambda tokens: tokens * 4 * paper.solo_s_per_token, 0.5)
    assert slower.classes["text"].ttft_s == pytest.approx(0.5, rel=1e-3)
    with pytest.raises(ConfigError, match="solo_s_per_token"):
        for_machine(load_objectives("qwen-14b"), lambda tokens: 1.0)


def test_objectives_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"mine": {"classes": {"chat": {"ttft_s": 0.3}}}}))
    assert load_objectives(path).classes["chat"].ttft_s == 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object with one map"),
        ('{"m": {}}', "expected classes"),
        ('{"m": {"classes": {"a": {"ttft": 1}}}}', "expected classes"),
        ('{"m": {"classes": {"a": {"ttft_s": 0}}}}', "m.a.ttft_s: got 0, expected a number > 0"),
    ],
)
def test_bad_objectives_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_objectives(path)
    assert message in str(error.value)


def test_unknown_objectives_and_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of qwen-8b"):
        load_objectives("qwen-9b")
    with pytest.raises(ConfigError, match="class 'video', expected one of text"):
        with_objectives(Trace("t", (TraceRequest(0, 5, 1, "video"),)), load_objectives("qwen-8b"))
    with pytest.raises(ConfigError, match="slo_scale: got 0"):
        with_objectives(TRACE, load_objectives("length-8b"), 0)
