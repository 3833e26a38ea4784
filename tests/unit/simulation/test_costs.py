"""WorkCosts: the planner's plans as seconds and boundaries, for each granularity."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flowprefill import _core
from flowprefill.config import Granularity
from flowprefill.scheduling import CostModel
from flowprefill.scheduling.cost_model import attention_pairs
from flowprefill.simulation import Profile, WorkCosts

PROFILE = Profile.load("llama-3.1-8b@h100")
GRANULARITIES = ("none", "layer", "operator", "chunk:512", "budget:2", "budget:0.5")


def costs_of(text: str) -> WorkCosts:
    return WorkCosts(PROFILE, Granularity.parse(text))


def longest_segment_s(costs: WorkCosts, tokens: int) -> float:
    pairs = attention_pairs(tokens, 0)
    bounds = costs.bounds(tokens, pairs)
    longest = max(b - a for a, b in zip([0.0, *bounds], bounds, strict=False))
    return longest * costs.prefill_s(tokens, pairs)


@pytest.mark.parametrize("text", ["none", "layer", "operator", "budget:2"])
@pytest.mark.parametrize("tokens", [300, 2_000, 9_001])
def test_costs_are_what_the_cost_model_predicts(text: str, tokens: int) -> None:
    predicted_s = CostModel(PROFILE.shape, PROFILE.rates).prefill_s(tokens)
    actual_s = costs_of(text).prefill_s(tokens, attention_pairs(tokens, 0))
    assert actual_s == pytest.approx(predicted_s, rel=0.12)  # each step has an overhead
    assert actual_s >= predicted_s - 1e-9


def test_costs_of_a_wider_element_read_its_bytes_once() -> None:
    machine = replace(PROFILE.rates, weight_bytes_per_s=1e9)
    wide = replace(
        PROFILE,
        shape=replace(PROFILE.shape, weight_bytes=2 * PROFILE.shape.weight_bytes),
        rates=machine,
        cuts=_core.CutRules(weight_element_bytes=4, max_tile_rows=4096),
    )
    seconds = WorkCosts(wide, Granularity("none")).prefill_s(8, 0.0)
    assert seconds == pytest.approx((wide.shape.weight_bytes + 4 * 128_256 * 4096) / 1e9, rel=0.01)


@pytest.mark.parametrize("threads", [1, 2, 4, 16])
@pytest.mark.parametrize("model", ["smollm2-135m", "llama-3.1-8b", "llama-3-70b"])
def test_budget_holds_on_a_cpu_whatever_the_size_of_the_model(model: str, threads: int) -> None:
    """Slices of a product are one block of columns for each thread before tiles get fewer rows."""
    rates = _core.MachineRates(
        gemm_flops_per_s=0.5e12 * threads,
        attention_flops_per_s=0.4e12 * threads,
        weight_bytes_per_s=25e9 * threads,
    )
    options = _core.PlanOptions(granularity="budget", rates=rates, budget_s=0.002)
    graph = Profile.load(f"{model}@zen5x2").graph
    planner = _core.PlanPredictor(graph, _core.cpu_cuts("bf16", threads))
    assert max(planner.segments(8_192, 0, options)) < 1.02 * 0.002


@pytest.mark.parametrize("text", GRANULARITIES)
def test_costs_boundaries_rise_to_one(text: str) -> None:
    bounds = costs_of(text).bounds(9_001, attention_pairs(9_001, 0))
    assert bounds[-1] == 1.0
    assert list(bounds) == sorted(set(bounds))
    expected = {"none": 1, "layer": 33, "chunk:512": 18}
    if text in expected:
        assert len(bounds) == pytest.approx(expected[text], abs=1)
    else:
        assert len(bounds) > 100


def test_costs_budget_bounds_the_segments_of_any_prompt() -> None:
    costs = costs_of("budget:2")
    overhead_s = PROFILE.rates.run_overhead_s
    for tokens in (500, 8_000, 50_000):
        assert longest_segment_s(costs, tokens) < 2e-3 * 1.05 + overhead_s
    # The fewest queries that fill the device.
    assert longest_segment_s(costs, 100_000) < 2e-3 * 1.15 + overhead_s
    assert longest_segment_s(costs_of("operator"), 100_000) > 0.05


def test_costs_cached_context_costs_attention_only() -> None:
    costs = costs_of("budget:2")
    more_s = costs.prefill_s(100, attention_pairs(100, 5_000))
    more_s -= costs.prefill_s(100, attention_pairs(100, 0))
    flops = 100 * 5_000 * PROFILE.shape.attention_flops_per_pair
    assert more_s == pytest.approx(flops / PROFILE.rates.attention_flops_per_s)


def test_costs_decode_step_reads_weights_and_cache() -> None:
    costs, rates, shape = costs_of("budget:2"), PROFILE.rates, PROFILE.shape
    empty_s = rates.run_overhead_s + (shape.weight_bytes + shape.head_bytes) / 2.7e12
    assert costs.decode_s(1, 0) == pytest.approx(empty_s)
    assert shape.cache_bytes_per_token == 2 * 8 * 128 * 32 * 2
    read_s = 64 * 4_000 * shape.cache_bytes_per_token / rates.weight_bytes_per_s
    assert costs.decode_s(64, 64 * 4_000) == pytest.approx(costs.decode_s(64, 0) + read_s)
    assert CostModel(shape, rates).decode_s(64, 256_000) == pytest.approx(
        costs.decode_s(64, 256_000)
    )


def test_costs_each_sequence_of_a_decode_step_adds_its_overhead() -> None:
    slower = replace(PROFILE, sequence_overhead_s=1e-3)
    more = WorkCosts(slower, Granularity.parse("budget:2"))
    added_s = more.decode_s(7, 700) - costs_of("budget:2").decode_s(7, 700)
    assert added_s == pytest.approx(7e-3)


@pytest.mark.parametrize(
    ("rows", "context", "message"),
    [(0, 0, "rows: got 0"), (5, -1, "context: got -1"), ("x", 0, "rows: got 'x'")],
)
def test_plan_predictor_bad_size_is_named(rows: object, context: int, message: str) -> None:
    plan = _core.PlanOptions(
        granularity="none",
        rates=_core.MachineRates(
            gemm_flops_per_s=1e12, attention_flops_per_s=1e12, weight_bytes_per_s=1e11
        ),
    )
    with pytest.raises(ValueError, match=message):
        PROFILE.predictor.segments(rows, context, plan)  # type: ignore[arg-type]


def test_cut_rules_bad_field_is_named() -> None:
    with pytest.raises(ValueError, match="row_step: got 0, expected at least 1"):
        _core.CutRules(row_step=0)
    with pytest.raises(ValueError, match="attention_slices: got heads, expected rows, heads_first"):
        _core.CutRules(attention_slices="heads")  # type: ignore[arg-type]
