"""Percentiles and the quantiles of report rows."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill.bench.statistics import median, percentile, quantiles

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@pytest.mark.parametrize(
    ("share", "expected"), [(0, 1.0), (0.5, 2.5), (0.25, 1.75), (1, 4.0), (0.99, 3.97)]
)
def test_percentile_interpolates_between_neighbours(share: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == pytest.approx(expected)


def test_percentile_of_nothing_is_nan() -> None:
    assert math.isnan(percentile([], 0.5))
    assert math.isnan(median([]))


@pytest.mark.parametrize("share", [-0.1, 1.1, 50, math.nan])
def test_percentile_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share: got"):
        percentile([1.0], share)


@given(numbers)
def test_median_agrees_with_the_standard_library(values: list[float]) -> None:
    assert median(values) == pytest.approx(statistics.median(values), rel=1e-9, abs=1e-9)


@given(numbers, st.floats(0, 1), st.floats(0, 1))
def test_percentile_grows_with_the_share(values: list[float], a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert percentile(values, low) <= percentile(values, high) + 1e-9


def test_quantiles_are_named_for_rows() -> None:
    row = quantiles("blocking", iter([3.0, 1.0, 2.0]), (0.5, 0.99, 1))
    assert list(row) == ["blocking_p50_s", "blocking_p99_s", "blocking_max_s"]
    assert row["blocking_p50_s"] == 2.0
    assert row["blocking_max_s"] == 3.0
