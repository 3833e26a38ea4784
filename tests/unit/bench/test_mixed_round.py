"""Blocking times from timelines, arrival times, and the rows of `bench hol`."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from rounds import answer, make_round, segment

from flowprefill.bench.hol import row_of
from flowprefill.bench.mixed_round import JITTER, LONG_RUN, arrival_offsets, blocking_times

TIMELINE = [
    segment(LONG_RUN, 0.0, 2.0),
    segment(LONG_RUN, 2.0, 4.0),
    segment("prefill short-1", 4.0, 5.0),
    segment(LONG_RUN, 5.0, 6.0),
    segment("prefill of 2", 6.5, 7.0),
]
ROW_NAMES = (
    "granularity", "short_alone_p50_s", "short_beside_p50_s", "short_beside_p99_s", "long_alone_s",
    "long_beside_s", "blocking_p50_s", "blocking_p99_s", "blocking_max_s", "prefill_tokens_per_s",
)  # fmt: skip


@pytest.mark.parametrize(
    ("arrival_s", "expected"),
    [
        (0.5, [3.5]),  # the long one went on over a boundary: counted until it left the device
        (3.0, [1.0]),
        (5.25, [1.25]),  # to the start of the pack, the switch included
        (4.5, []),  # a short one executes: not the long one's doing
        (-1.0, []),
        (6.2, []),  # nothing executes
        (9.0, []),
    ],
)
def test_blocking_counts_until_the_long_prompt_leaves(
    arrival_s: float, expected: list[float]
) -> None:
    assert blocking_times([arrival_s], TIMELINE, LONG_RUN) == pytest.approx(expected)


def test_blocking_at_the_end_of_the_timeline_is_not_made_up() -> None:
    assert blocking_times([1.0], TIMELINE[:2], LONG_RUN) == []


def test_arrivals_fall_within_the_span_and_waits_are_bounded() -> None:
    offsets = arrival_offsets(random.Random(5), 200, 20.0)
    waits = [b - a for a, b in itertools.pairwise([0.0, *offsets])]
    mean_s = 20.0 / 201
    assert all((1 - JITTER) * mean_s <= wait <= (1 + JITTER) * mean_s for wait in waits)
    assert offsets[-1] < 20.0 * (1 + JITTER)
    assert offsets == arrival_offsets(random.Random(5), 200, 20.0)


def test_hol_row_has_the_stated_names_and_compares_with_none_of_the_same_round() -> None:
    rounds = [[make_round("none", 8.0), make_round("budget:2", 0.5)]]
    row = row_of("budget:2", rounds)
    assert row.keys() >= set(ROW_NAMES)
    assert row["short_beside_p50_s"] == pytest.approx(1.5)
    assert row["blocking_max_s"] == pytest.approx(0.5)
    assert row["long_beside_s"] == pytest.approx(11.0)
    assert row["prefill_tokens_per_s"] == pytest.approx(100.0)
    assert row["throughput_vs_none"] == pytest.approx(1.0)
    assert row_of("none", rounds)["blocking_p50_s"] == pytest.approx(8.0)
    assert row_of("budget:2", [rounds[0][1:]])["throughput_vs_none"] is None


def test_hol_percentiles_are_of_the_prompts_that_all_granularities_got() -> None:
    """None ended early and was sent one short prompt, the other two: the second is not compared."""
    whole, cut = make_round("none", 8.0), make_round("budget:2", 0.5)
    later = answer("short-2", 107.0, 3.0, 1.0)
    cut = replace(cut, shorts=[*cut.shorts, later], tokens=2 * cut.tokens)
    row = row_of("budget:2", [[whole, cut], [whole, make_round("budget:2", 1.0)]])
    assert row["short_beside_p99_s"] == pytest.approx(1.995)
    assert (row["shorts"], row["blocked"]) == (2, 2)
    assert row_of("budget:2", [[whole, cut]])["throughput_vs_none"] == pytest.approx(2.0)
    assert row_of("budget:2", [[cut]])["short_beside_p99_s"] == pytest.approx(3.975)
