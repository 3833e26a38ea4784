"""CostModel: the formula, what context costs, what it learns, and what it keeps on disk."""

from __future__ import annotations

import math

import pytest

from flowprefill.scheduling import CostModel, MachineRates, ModelShape
from flowprefill.scheduling.cost_model import MAX_CORRECTION, RunShape, attention_pairs
from flowprefill.scheduling.operator_rates import MOST, OperatorTime

SHAPE = ModelShape(1e6, 1e6, 1e2, 1e3, 1e4)
RATES = MachineRates(1e10, 1e9, 1e9, 1e-3)


def test_prefill_formula_sums_its_parts() -> None:
    model = CostModel(SHAPE, RATES)
    linear = max(1e6 / 1e9, 100 * 1e6 / 1e10)
    attention = (100 * 50 + 100 * 101 / 2) * 1e2 / 1e9
    assert model.prefill_s(100, 50) == pytest.approx(1e-3 + linear + attention + 1e4 / 1e9)


def test_prefill_few_tokens_costs_reading_the_weights() -> None:
    model = CostModel(SHAPE, RATES)
    assert model.prefill_s(1) == pytest.approx(1e-3 + 1e-3 + 1e2 / 1e9 + 1e-5)


def test_prefill_cached_context_costs_attention_only() -> None:
    model = CostModel(SHAPE, RATES)
    more = model.prefill_s(100, 1000) - model.prefill_s(100, 0)
    assert more == pytest.approx(100 * 1000 * 1e2 / 1e9)
    assert model.prefill_s(100, 1000) < model.prefill_s(1100, 0)


def test_packed_prefill_one_overhead_and_own_attention_each() -> None:
    model = CostModel(SHAPE, RATES)
    alone = model.prefill_s(200) + model.prefill_s(300)
    packed = model.packed_prefill_s(500, attention_pairs(200, 0) + attention_pairs(300, 0), 2)
    assert alone - packed == pytest.approx(1e-3 + 1e-5)
    assert attention_pairs(3, 2) == 2 + 1 + 2 + 2 + 2 + 3  # rows see 3, 4 and 5 tokens


def test_observe_slower_machine_correction_approaches_it() -> None:
    model = CostModel(SHAPE, RATES)
    for _ in range(100):
        model.observe("prefill", model.prefill_s(100), 0.03)
    assert model.prefill_s(100) == pytest.approx(0.03, rel=0.01)
    assert model.correction("decode") == 1.0


def test_observe_absurd_values_correction_stays_bounded() -> None:
    model = CostModel(SHAPE, RATES)
    for _ in range(1000):
        model.observe("decode", 1e-6, 1e6)
    assert model.correction("decode") == MAX_CORRECTION
    for wrong in (0.0, -1.0, math.nan, math.inf):
        model.observe("prefill", 1.0, wrong)
    assert model.correction("prefill") == 1.0


def test_error_quantile_after_works_is_of_their_ratios() -> None:
    model = CostModel(SHAPE, RATES)
    assert math.isnan(model.error_quantile("prefill", 0.5))
    for ratio in (0.5, 1.0, 2.0):
        model.observe("prefill", 1.0, ratio)
    assert model.error_quantile("prefill", 0.5) == 1.0
    assert model.error_quantile("prefill", 1.0) == 2.0


def test_optimistic_before_calibration_is_far_below_the_prediction() -> None:
    assert CostModel(SHAPE).optimistic_prefill_s(1.0) == 0.25
    assert CostModel(SHAPE, is_calibrated=True).optimistic_prefill_s(1.0) == 0.8


def shape_of(tokens: int) -> RunShape:
    return RunShape(tokens, attention_pairs(tokens, 0), 1)


def learnt(slower_attention: float, *, with_shape: bool) -> dict[int, float]:
    """Return predicted over true time by length after works of both on a machine that differs."""
    model = CostModel(SHAPE, RATES)
    slow = MachineRates(1e10, 1e9 / slower_attention, 1e9, 1e-3)
    truth = CostModel(SHAPE, slow)
    lengths = (200, 4_000)
    for number in range(600):
        tokens = lengths[number % 2]
        shape = shape_of(tokens) if with_shape else None
        model.observe("prefill", model.prefill_s(tokens), truth.prefill_s(tokens), shape)
    return {tokens: model.prefill_s(tokens) / truth.prefill_s(tokens) for tokens in lengths}


@pytest.mark.parametrize("slower", [0.4, 3.0])
def test_observe_works_of_different_lengths_tell_attention_from_the_rest(slower: float) -> None:
    for ratio in learnt(slower, with_shape=True).values():
        assert ratio == pytest.approx(1.0, abs=0.03)
    errors = [abs(ratio - 1.0) for ratio in learnt(slower, with_shape=False).values()]
    assert max(errors) > 0.2


def test_observe_attention_stays_within_its_bounds() -> None:
    model = CostModel(SHAPE, RATES)
    for _ in range(2_000):
        model.observe("prefill", 1.0, 1e9, shape_of(100_000))
    most = MAX_CORRECTION * MOST
    plain = CostModel(SHAPE, RATES).prefill_s(100_000)
    assert plain < model.prefill_s(100_000) <= most * plain


def test_decode_long_caches_cost_reading_them() -> None:
    shape = ModelShape(1e6, 1e6, 1e2, 1e3, 1e4, cache_bytes_per_token=1e4)
    model, free = CostModel(shape, RATES), CostModel(SHAPE, RATES)
    assert model.decode_s(4, 5_000) - model.decode_s(4, 0) == pytest.approx(5_000 * 1e4 / 1e9)
    assert free.decode_s(4, 5_000) - free.decode_s(4, 0) == pytest.approx(5_000 * 1e2 / 1e9)
    with pytest.raises(ValueError, match="cache_bytes_per_token: got -1"):
        ModelShape(1e6, 1e6, 1e2, 1e3, 1e4, cache_bytes_per_token=-1)


def decode_shape(sequences: int, context: int) -> RunShape:
    return RunShape(sequences, context, sequences)


def test_observe_decode_steps_tell_the_cache_from_the_weights() -> None:
    shape = ModelShape(1e6, 1e7, 1e2, 1e3, 1e4, cache_bytes_per_token=1e4)
    model = CostModel(shape, RATES)
    for number in range(800):
        sequences, context = (1, 100) if number % 32 < 16 else (8, 8_000)
        true_s = 1e-3 + 2.0 * (1e7 + 1e4) / 1e9 + 0.5 * context * 1e4 / 1e9
        predicted_s = model.decode_s(sequences, context)
        model.observe("decode", predicted_s, true_s, decode_shape(sequences, context))
    assert model.operators.corrections.weights == pytest.approx(2.0, rel=0.1)
    assert model.operators.corrections.cache == pytest.approx(0.5, rel=0.1)
    for sequences, context in ((1, 100), (8, 8_000), (4, 2_000)):
        true_s = 1e-3 + 2.0 * (1e7 + 1e4) / 1e9 + 0.5 * context * 1e4 / 1e9
        assert model.decode_s(sequences, context) == pytest.approx(true_s, rel=0.05)


def test_observe_works_predicted_long_ago_do_not_correct_twice() -> None:
    model = CostModel(SHAPE, RATES)
    before_s = model.prefill_s(1_000)
    for _ in range(50):  # all were predicted before the first of them ended
        model.observe("prefill", before_s, 0.5 * before_s, shape_of(1_000))
    assert model.prefill_s(1_000) == pytest.approx(0.5 * before_s, rel=0.03)
    assert model.correction("prefill") == pytest.approx(1.0, abs=0.05)


def test_told_segments_whole_runs_move_the_rates_no_more() -> None:
    model = CostModel(SHAPE, RATES)
    work = {"weight_bytes": 0.0, "attention_flops": 0.0, "cache_bytes": 0.0, "other_s": 0.0}
    for _ in range(20):
        told = OperatorTime(product_flops=1e9, seconds=0.05, segments=20, **work)
        model.observe_operators([told])
    learnt_of = model.operators.corrections
    assert learnt_of.products == pytest.approx(0.5, rel=0.02)
    assert tuple(model.corrections) == pytest.approx(tuple(learnt_of), rel=0.16)
    model.observe("prefill", 1.0, 9.0, shape_of(100))
    assert model.operators.corrections == learnt_of
    assert model.nominal_s(shape_of(100)) == CostModel(SHAPE, RATES).prefill_s(100)


def test_few_rows_read_the_experts_that_they_have() -> None:
    shape = ModelShape(1.0, 1000.0, 1.0, 1.0, 1.0, expert_bytes=800.0, expert_share=0.25)
    assert shape.read_bytes(1) == 400.0
    assert shape.read_bytes(2) == 200.0 + 800.0 * (1 - 0.75**2)
    assert shape.read_bytes(1000) == 1000.0
    steps = CostModel(shape, MachineRates(1e30, 1e30, 1.0, 1e-9))
    assert steps.decode_s(1, 0) < steps.decode_s(2, 0) < steps.decode_s(16, 0)
