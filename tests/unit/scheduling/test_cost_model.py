"""CostModel: the formula, what context costs, what it learns, and what it keeps on disk."""

from __future__ import annotations

import math

import pytest

from flowprefill.scheduling import CostModel, MachineRates, ModelShape
from flowprefill.scheduling.cost_model import MAX_CORRECTION, attention_pairs

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


def test_batch_prefill_one_overhead_and_own_attention_each() -> None:
    model = CostModel(SHAPE, RATES)
    alone = model.prefill_s(200) + model.prefill_s(300)
    packed = model.batch_prefill_s([(200, 0), (300, 0)])
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


def learnt(slower_attention: float, *, with_prompts: bool) -> dict[int, float]:
    """Return predicted over true time by length after works of both on a machine that differs."""
    model = CostModel(SHAPE, RATES)
    slow = MachineRates(1e10, 1e9 / slower_attention, 1e9, 1e-3)
    truth = CostModel(SHAPE, slow)
    lengths = (200, 4_000)
    for number in range(600):
        tokens = lengths[number % 2]
        prompts = [(tokens, 0)] if with_prompts else []
        model.observe("prefill", model.prefill_s(tokens), truth.prefill_s(tokens), prompts)
    return {tokens: model.prefill_s(tokens) / truth.prefill_s(tokens) for tokens in lengths}


@pytest.mark.parametrize("slower", [0.4, 3.0])
def test_observe_prompts_of_different_lengths_tell_attention_from_the_rest(slower: float) -> None:
    for ratio in learnt(slower, with_prompts=True).values():
        assert ratio == pytest.approx(1.0, abs=0.03)
    errors = [abs(ratio - 1.0) for ratio in learnt(slower, with_prompts=False).values()]
    assert max(errors) > 0.2


def test_observe_attention_stays_within_its_bounds() -> None:
    model = CostModel(SHAPE, RATES)
    for _ in range(2_000):
        model.observe("prefill", 1.0, 1e9, [(100_000, 0)])
    most = MAX_CORRECTION**2
    plain = CostModel(SHAPE, RATES).prefill_s(100_000)
    assert plain < model.prefill_s(100_000) <= most * plain


def test_decode_long_caches_cost_reading_them() -> None:
    shape = ModelShape(1e6, 1e6, 1e2, 1e3, 1e4, cache_bytes_per_token=1e4)
    model, free = CostModel(shape, RATES), CostModel(SHAPE, RATES)
    assert model.decode_s(4, 5_000) - model.decode_s(4, 0) == pytest.approx(5_000 * 1e4 / 1e9)
    assert free.decode_s(4, 5_000) - free.decode_s(4, 0) == pytest.approx(5_000 * 1e2 / 1e9)
    with pytest.raises(ValueError, match="cache_bytes_per_token: got -1"):
        ModelShape(1e6, 1e6, 1e2, 1e3, 1e4, cache_bytes_per_token=-1)
