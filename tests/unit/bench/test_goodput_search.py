"""Searching the highest rate, paired intervals, settings, and records that can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from flowprefill.bench.goodput.measurement import (
    Measurement,
    Served,
    Stretch,
    summarised,
)
from flowprefill.bench.goodput.pairs import mean_interval, ratio_interval, share_interval
from flowprefill.bench.goodput.records import Records
from flowprefill.bench.goodput.search import Search
from flowprefill.bench.goodput.setting import BASELINES, FEW, OURS, Setting
from flowprefill.errors import ConfigError
from flowprefill.traces import TraceRequest


def run_search(curve: Callable[[int], float], start: int) -> tuple[Search, int]:
    search, asked = Search(0.9, start, stride=4, least=-100, most=100), 0
    while not search.is_done:
        search.tell(search.next_index, curve(search.next_index))
        asked += 1
        assert asked < 50
    return search, asked


@pytest.mark.parametrize("start", [-100, -20, 0, 37, 100])
@pytest.mark.parametrize("knee", [-99, -3, 0, 1, 42, 98])
def test_search_finds_the_knee_from_anywhere(start: int, knee: int) -> None:
    search, asked = run_search(lambda index: 1.0 if index <= knee else 0.8, start)
    assert (search.low, search.high) == (knee, knee + 1)
    assert search.index == pytest.approx(knee + 0.5)
    assert asked <= 16


def test_search_interpolates_between_neighbours() -> None:
    search, _ = run_search(lambda index: 0.95 - 0.02 * index, 0)
    assert search.index == pytest.approx(2.5)


def test_search_out_of_reach_says_so() -> None:
    search, _ = run_search(lambda index: 0.5, 0)
    assert search.index is None


def test_search_that_was_ended_early_gives_what_it_has() -> None:
    search = Search(0.9, 0, 4, least=-100, most=100)
    search.tell(0, 1.0)
    assert search.index is None
    search.tell(4, 0.8)
    assert not search.is_done
    assert search.index == pytest.approx(2.0)


def test_search_that_always_attains_ends_at_the_top() -> None:
    search, _ = run_search(lambda index: 1.0, 0)
    assert search.index == 100


def test_interval_of_known_values() -> None:
    # 1..5: mean 3, standard error sqrt(2.5 / 5), t of 4 degrees of freedom 2.776.
    found = mean_interval([1, 2, 3, 4, 5])
    assert found.mean == 3
    assert found.high - found.mean == pytest.approx(2.776 * math.sqrt(0.5))
    assert found.low == pytest.approx(6 - found.high)


def test_interval_of_shares_ends_where_shares_do() -> None:
    # 1 and 0.5: mean 0.75, standard error 0.25, t of one degree of freedom 12.706.
    assert mean_interval([1.0, 0.5]).high == pytest.approx(0.75 + 12.706 * 0.25)
    found = share_interval([1.0, 0.5])
    assert (found.low, found.mean, found.high) == (0.0, 0.75, 1.0)
    inside = share_interval([0.5, 0.51])
    assert 0 < inside.low < inside.mean < inside.high < 1


def test_ratio_is_paired_and_leaves_out_what_is_unknown() -> None:
    # Each pair has ratio 2, however much the samples differ: the interval is a point.
    found = ratio_interval([2.0, 20.0, None, 1.0], [1.0, 10.0, 5.0, None])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert found.count == 2
    assert math.isnan(ratio_interval([None], [1.0]).mean)


@pytest.mark.parametrize("text", [*BASELINES, *FEW])
def test_baselines_parse_and_print_alike(text: str) -> None:
    assert str(Setting.parse(text)) == text


def test_ours_is_among_the_baselines() -> None:
    assert OURS in BASELINES
    assert OURS in FEW


@pytest.mark.parametrize(
    "text", ["fcfs", "lifo+none", "fcfs+chunk:1", "fcfs+none+batch:0", "fcfs+none+batch:x"]
)
def test_bad_setting_is_refused(text: str) -> None:
    if text == "fcfs+none+batch:0":  # 0 is the default
        assert Setting.parse(text) == Setting("fcfs", "none")
        return
    with pytest.raises(ConfigError):
        Setting.parse(text)


def test_chunks_are_scaled_with_the_lengths() -> None:
    scaled = [Setting.parse(text).scaled(0.18) for text in FEW]
    assert [str(one) for one in scaled] == [
        "fcfs+none",
        "slack_edf+chunk:96",
        "fcfs+chunk:368+batch:368",
        "s_edf_paper+operator",
        "slack_edf+budget:2",
    ]


REQUESTS = [TraceRequest(float(n), 10, service_class="ab"[n % 2], ttft_s=1.0) for n in range(4)]
SERVED = [Served(one, ttft_s, ttft_s <= 1) for one, ttft_s in zip(REQUESTS, (0.5, 2, 1, math.inf),
                                                                 strict=True)]  # fmt: skip


def test_summary_counts_by_class_and_keeps_details_on_demand() -> None:
    found = summarised(SERVED, [0.1, 0.3], 7)
    assert (found.attainment, found.by_class) == (0.5, {"a": 1.0, "b": 0.0})
    assert (found.failed, found.preemptions, found.span_s) == (1, 7, 3.0)
    assert found.blocking_mean_s == pytest.approx(0.2)
    assert found.ttft_s == {}
    detailed = summarised(SERVED, [0.3, 0.1], 7, stretches=[Stretch(0, 0, 1)], is_detailed=True)
    assert detailed.ttft_s == {"a": [0.5, 1], "b": [2]}
    assert detailed.blocking_s == [0.1, 0.3]


def test_records_are_read_again_and_refuse_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    records = Records(path, {"seed": 1, "trace": None})
    measured = summarised(SERVED, [0.1], 1, stretches=[Stretch(3, 0.5, 1)], is_detailed=True)
    records.add("here", measured)
    records.write()
    again = Records(path, {"seed": 1, "trace": None})
    assert list(again) == ["here"]
    assert again["here"] == measured
    with pytest.raises(ConfigError, match="seed 1, now it is 2: use another file"):
        Records(path, {"seed": 2, "trace": None})


ODD = '{"settings": {}, "measurements": {"a": {"x": 1}}}'


@pytest.mark.parametrize("text", ["", "[]", '{"settings": {}}', ODD])
def test_records_of_another_kind_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected a file of an earlier run"):
        Records(path, {})


def test_measurement_without_details_round_trips() -> None:
    found = summarised(SERVED, [], 0)
    assert Measurement.from_dict(found.to_dict()) == found
