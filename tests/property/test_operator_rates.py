"""OperatorRates: what it learns of one kind and of all, under noise, within its bounds."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowprefill.scheduling.operator_rates import MOST, NONE, Corrections, OperatorRates

Parts = tuple[float, float, float, float]

# Seconds of segments of products, of weights, of attention, of the cache; of a short and of a long
# prompt as a whole. Segments of one kind have a little of another in them.
MIXES: tuple[Parts, ...] = (
    (2e-2, 1e-4, 1e-3, 0.0),
    (0.0, 8e-3, 0.0, 5e-4),
    (1e-3, 0.0, 3e-2, 0.0),
    (0.0, 5e-4, 0.0, 3e-3),
    (5e-2, 1e-3, 5e-3, 0.0),
    (1.5, 1e-3, 2.5, 0.0),
)
OTHER_S = 1e-4
SEGMENT_S = 2e-3


def seconds_of(truth: Corrections, parts: Parts) -> float:
    """Return the time of work on a machine that is as the truth says."""
    return OTHER_S + sum(factor * part for factor, part in zip(truth, parts, strict=True))


def segments_of(parts: Parts) -> int:
    """Return in how many segments it is executed."""
    return max(round(sum(parts) / SEGMENT_S), 1)


def error_of(rates: OperatorRates, truth: Corrections) -> float:
    """Return the worst error of a prediction, as a ratio above 1."""
    ratios = [seconds_of(rates.corrections, mix) / seconds_of(truth, mix) for mix in MIXES]
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def taught(truth: Corrections, rounds: int, seed: int = 0) -> OperatorRates:
    """Return what so many looks at every mix, in random order, have taught."""
    rates, mixes, rng = OperatorRates(), list(MIXES), random.Random(seed)
    for _ in range(rounds):
        rng.shuffle(mixes)
        for mix in mixes:
            rates.observe(mix, OTHER_S, seconds_of(truth, mix), segments_of(mix))
    return rates


FACTORS = st.floats(1 / 4, 4)


@pytest.mark.parametrize("kind", range(len(NONE)))
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_one_kind_that_differs_is_found_within_a_few_runs(kind: int, factor: float) -> None:
    truth = Corrections(*(factor if k == kind else 1.0 for k in range(len(NONE))))
    assert error_of(taught(truth, 1), truth) < 1.35
    assert error_of(taught(truth, 4), truth) < 1.1
    assert error_of(taught(truth, 20), truth) < 1.03


@given(st.builds(Corrections, FACTORS, FACTORS, FACTORS, FACTORS), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_any_machine_is_found_in_any_order(truth: Corrections, seed: int) -> None:
    rates = taught(truth, 20, seed)
    assert error_of(rates, truth) < 1.2
    assert tuple(rates.planned) == pytest.approx(tuple(rates.corrections), rel=0.16)


def noisy(rng: random.Random, segments: int) -> float:
    """Return measured over true time of segments: one in a hundred stalls for 20 times its own.

    Among others a stalled one counts as three times the usual, see operator_times() in csrc/graph.
    """
    most = 3.0 if segments > 2 else math.inf
    ratios = [
        min(rng.lognormvariate(0.0, 0.3) * (20.0 if rng.random() < 0.01 else 1.0), most)
        for _ in range(segments)
    ]
    return sum(ratios) / segments


@given(st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_noise_and_stalls_move_predictions_by_little(seed: int) -> None:
    truth, rng, rates = Corrections(0.5, 0.5, 0.7, 2.0), random.Random(seed), OperatorRates()
    errors: list[float] = []
    for number in range(300):
        mix = MIXES[number % len(MIXES)]
        segments = min(segments_of(mix), 50)
        rates.observe(mix, OTHER_S, seconds_of(truth, mix) * noisy(rng, segments), segments)
        errors.append(error_of(rates, truth))
    late = sorted(errors[60:])
    assert late[len(late) // 2] < 1.2
    assert late[-1] < 1.5


OBSERVED = st.floats(allow_nan=True, allow_infinity=True)
SECONDS = st.floats(0.0, 1e3)


@given(st.lists(st.tuples(st.tuples(SECONDS, SECONDS, SECONDS, SECONDS), OBSERVED), max_size=60))
@settings(max_examples=60, deadline=None)
def test_whatever_is_observed_factors_stay_within_their_bounds(
    observed: list[tuple[Parts, float]],
) -> None:
    rates, again = OperatorRates(), OperatorRates()
    for parts, seconds in observed:
        rates.observe(parts, 0.0, seconds, 1)
        again.observe(parts, 0.0, seconds, 1)
        for factor in (*rates.corrections, *rates.planned):
            assert 1 / MOST * 0.999 <= factor <= MOST * 1.001
    assert rates.corrections == again.corrections


def test_kinds_that_were_not_seen_go_along_in_part() -> None:
    rates = OperatorRates()
    for _ in range(10):
        rates.observe((2e-2, 0.0, 0.0, 0.0), 0.0, 1e-2, 8)
    products, *others = rates.corrections
    assert products == pytest.approx(0.5, rel=0.02)
    for other in others:
        assert 0.5 < other < 0.75
    assert [rates.is_known(kind) for kind in range(len(NONE))] == [True, False, False, False]


def test_segments_are_planned_anew_for_a_reason_only() -> None:
    rates, plans, rng = OperatorRates(), set[Corrections](), random.Random(3)
    for number in range(1_000):
        mix = MIXES[number % len(MIXES)]
        noise = rng.lognormvariate(0.0, 0.3 / math.sqrt(segments_of(mix)))
        rates.observe(mix, OTHER_S, seconds_of(NONE, mix) * noise, segments_of(mix))
        plans.add(rates.planned)
    assert len(plans) <= 20, "in a quarter of an hour of execution"
    for _ in range(100):
        for mix in MIXES:
            rates.observe(mix, OTHER_S, 2.0 * seconds_of(NONE, mix), segments_of(mix))
    assert tuple(rates.corrections) == pytest.approx((2.0, 2.0, 2.0, 2.0), rel=0.1)
    assert tuple(rates.planned) == pytest.approx(tuple(rates.corrections), rel=0.16)
