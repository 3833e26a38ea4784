"""What `bench overload` makes of answers: how far Retry-After was from the truth."""

from __future__ import annotations

import math

import pytest

from flowprefill.bench.overload import Answer, retry_ratios, row_of


def admitted(sent_s: float, ttft_s: float) -> Answer:
    return Answer(sent_s, 200, ttft_s + 0.1, ttft_s, predicted_s=ttft_s / 2)


def refused(sent_s: float, retry_s: float) -> Answer:
    return Answer(sent_s, 429, 0.01, retry_s=retry_s)


def test_truth_is_when_the_next_one_was_admitted() -> None:
    answers = [admitted(0.0, 2.0), refused(2.0, 2.0), admitted(3.0, 50.0), refused(4.0, 1.0),
               refused(4.5, math.nan), admitted(6.0, 1.0)]  # fmt: skip
    assert retry_ratios(answers) == pytest.approx([2.0, 0.5])


def test_refusals_without_a_time_or_after_the_last_admitted_do_not_count() -> None:
    assert retry_ratios([refused(0.0, math.nan), admitted(0.5, 0.5), refused(1.0, 1.0)]) == []


def test_row_counts_each_request_once() -> None:
    row = row_of(
        "x", [admitted(0.0, 1.0), refused(0.5, 0.25), Answer(1.0), admitted(0.75, 1.0)], 7.0
    )
    assert (row["requests"], row["admitted"], row["refused"], row["failed"]) == (4, 2, 1, 1)
    assert row["ttft_over_predicted_p50"] == 2.0
    assert row["retry_within_2"] == 1.0
