"""What `bench load` sends, reads from traces, and makes of the answers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from flowprefill.bench.arrivals import MIX, MIX_CLASSES, Planned, random_mix, trace_plan
from flowprefill.bench.http_client import Outcome
from flowprefill.bench.load import answered_by_all, rows_of
from flowprefill.errors import ConfigError

ROW = {"timestamp": 2.0, "input_length": 1000, "output_length": 50, "type": "search"}


def write(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_random_mix_is_seeded_and_within_its_ranges() -> None:
    planned = random_mix(random.Random(1), 300, 10.0, 0.1)
    assert planned == random_mix(random.Random(1), 300, 10.0, 0.1)
    assert {one.service_class for one in planned} == set(MIX)
    for one in planned:
        _, least, most = MIX[one.service_class]
        assert least <= one.prompt_tokens <= most
    assert [one.at_s for one in planned] == sorted(one.at_s for one in planned)
    assert 0 < sum(one.cancel_after_s is not None for one in planned) < 100


def test_random_mix_at_rate_zero_arrives_at_once() -> None:
    assert {one.at_s for one in random_mix(random.Random(1), 5, 0.0, 0.0)} == {0.0}


def test_trace_lengths_and_gaps_are_scaled_and_cut(tmp_path: Path) -> None:
    later = ROW | {"timestamp": 4.0, "input_length": 99_999, "type": "text"}
    planned, classes = trace_plan(write(tmp_path, ROW, later), 0.1, 0.5, max_tokens=512)
    assert planned == [Planned(0.0, 100, 5, "search"), Planned(1.0, 507, 5, "text")]
    assert classes["search"] == {"ttft_ms": 4000}


def test_trace_of_other_classes_goes_by_length(tmp_path: Path) -> None:
    path = write(tmp_path, ROW | {"type": "video"}, ROW | {"type": "", "input_length": 9000})
    with pytest.raises(ConfigError, match=r"trace.jsonl:2: type: got '', expected a text"):
        trace_plan(path, 1.0, 1.0, 1000)
    planned, _ = trace_plan(write(tmp_path, ROW | {"type": "video"}), 1.0, 1.0, 1000)
    assert [one.service_class for one in planned] == ["text"]


def outcome(times_s: list[float], status: str = "ok", name: str = "interactive") -> Outcome:
    return Outcome(Planned(0.0, 100, 4, name), token_times_s=times_s, status=status)


def test_rows_count_who_met_both_objectives_and_leave_out_who_left() -> None:
    outcomes = [
        outcome([0.4, 0.5, 0.6]),
        outcome([0.6, 0.7]),  # first token too late
        outcome([0.1, 0.5]),  # tokens too slow
        outcome([], "HTTP 429"),
        outcome([], "cancelled"),
        outcome([20.0], name="batch"),
    ]
    combination = {"policy": "edf", "granularity": "none"}
    rows = rows_of(outcomes, MIX_CLASSES, 2.0, combination, answered_by_all([outcomes]))
    assert [row["service_class"] for row in rows] == ["interactive", "batch", "all"]
    first, _, everyone = rows
    assert (first["requests"], first["cancelled"], first["failed"]) == (4, 1, 1)
    assert first["attainment"] == 0.25
    assert first["failures"] == {"HTTP 429": 1}
    assert everyone["attainment"] == pytest.approx(2 / 5)
    assert everyone["goodput_per_s"] == 1.0
    assert first["ttft_p50_s"] == pytest.approx(0.4)


def test_percentiles_are_of_the_requests_that_all_combinations_answered() -> None:
    """A request that one combination refuses counts in neither's percentiles."""
    patient = [outcome([0.2]), outcome([9.0]), outcome([0.4])]
    refusing = [outcome([0.1]), outcome([], "HTTP 429"), outcome([0.3])]
    answered = answered_by_all([patient, refusing])
    assert answered == [True, False, True]
    for outcomes, p99_s in ((patient, 0.398), (refusing, 0.298)):
        row = rows_of(outcomes, MIX_CLASSES, 1.0, {}, answered)[-1]
        assert row["ttft_p99_s"] == pytest.approx(p99_s)
        assert (row["requests"], row["compared"]) == (3, 2)
    left = [outcome([0.2], "cancelled"), *refusing[1:]]
    assert answered_by_all([patient, left]) == [False, False, True]
