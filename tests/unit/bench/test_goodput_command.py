"""`bench goodput` as a command: a quick simulation, its report, resuming, and refused flags."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flowprefill import cli
from flowprefill.bench.goodput.chart import cumulative, ticks
from flowprefill.bench.goodput.lab import POINT_REQUESTS, Lab, Place
from flowprefill.bench.goodput.measurement import Measurement
from flowprefill.bench.goodput.records import Records
from flowprefill.bench.goodput.results import Ideals, rates_of, rows_of, sweep
from flowprefill.bench.goodput.setting import Setting
from flowprefill.traces import Trace, TraceRequest, synthetic_trace

OURS, FIRST = Setting.parse("slack_edf+budget:2"), Setting.parse("fcfs+none")


class FakeBackend:
    """Attains the target up to a known rate: ours carries three times as much as the other."""

    name, is_fast = "fake", True

    def __init__(self) -> None:
        self.calls: list[tuple[Setting, int]] = []

    def measure(
        self, setting: Setting, requests: Sequence[TraceRequest], seed: int, *, is_detailed: bool
    ) -> Measurement:
        self.calls.append((setting, seed))
        rate = Trace("t", tuple(requests)).rate_rps
        limit = 6.0 if setting == OURS else 2.0
        scale = requests[0].ttft_s  # 1 unless the objectives are scaled
        attainment = max(0.0, min(1.0, 1.9 - rate / limit / scale))
        return Measurement(attainment, {}, len(requests), 1.0)

    def solo_s(self, prompt_tokens: int) -> float:
        return 0.1

    def close(self) -> None: ...


def make_lab(path: Path | None = None) -> Lab:
    samples = [
        Trace("t", tuple(TraceRequest(n / 2, 10, ttft_s=1.0) for n in range(20))) for _ in range(3)
    ]
    return Lab(FakeBackend(), samples, 2.0, Records(path, {}), 1.01, seed=5)


def test_highest_rates_are_found_and_paired() -> None:
    lab = make_lab()
    ideals = Ideals({0.9: [6.0] * 3}, {0.9: [5.0] * 3})
    rows = rows_of(lab, lab.searches([FIRST, OURS], [0.9], stride=16), ideals)
    first, ours = rows
    assert first["max_rate_rps"] == pytest.approx(2.0, rel=1e-3)
    assert ours["max_rate_rps"] == pytest.approx(6.0, rel=1e-3)
    assert ours["ratio_to_fcfs"] == pytest.approx(3.0, rel=1e-3)
    assert first["ours_over"] == pytest.approx(3.0, rel=1e-3)
    assert ours["share_of_clairvoyant"] == pytest.approx(1.0, rel=1e-3)
    assert ours["share_of_queue_knowing"] == pytest.approx(1.2, rel=1e-3)
    assert ours["goodput_rps"] == pytest.approx(5.4, rel=1e-3)
    assert ours["samples"] == 3


def test_a_search_begins_where_it_is_told() -> None:
    lab = make_lab()
    starts = {(OURS, 0.9): [lab.index_of(5.9), None, lab.index_of(6.2)]}
    found = lab.searches([OURS], [0.9], 2, starts)[OURS, 0.9]
    asked = [len(search.attained) for search in found]
    assert max(asked[0], asked[2]) < asked[1]
    assert rates_of(lab, found) == pytest.approx([6.0] * 3, rel=1e-3)


def test_every_setting_gets_the_same_seeds() -> None:
    lab = make_lab()
    lab.searches([FIRST, OURS], [0.9], stride=16)
    backend = lab.backend
    assert isinstance(backend, FakeBackend)
    for setting in (FIRST, OURS):
        assert {seed for one, seed in backend.calls if one == setting} == {5, 6, 7}


def test_measurements_are_made_once_and_kept(tmp_path: Path) -> None:
    lab = make_lab(tmp_path / "r.json")
    lab.searches([OURS], [0.9], stride=16)
    lab.records.write()
    again = make_lab(tmp_path / "r.json")
    again.searches([OURS], [0.9], stride=16)
    backend = again.backend
    assert isinstance(backend, FakeBackend)
    assert backend.calls == []


def test_no_measurement_begins_that_may_end_after_the_budget() -> None:
    lab = make_lab()
    lab.deadline_s = 0.0
    found = lab.searches([OURS], [0.9], stride=16)
    assert lab.at(Place(OURS, 0, 0)) is None
    assert rows_of(lab, found)[0]["samples"] == 0


def test_budget_counts_the_span_of_what_is_sent_in_real_time() -> None:
    lab = make_lab()
    lab.backend.is_fast = False
    lab.deadline_s = time.monotonic() + 60.0
    span_s = lab.samples[0].span_s  # 9.5 s at the trace's own rate
    assert lab.has_time_for(lab.requests_at(Place(OURS, 0, 0)))
    stretched = Place(OURS, 0, lab.index_of(2.0 * span_s / 70.0))
    assert not lab.has_time_for(lab.requests_at(stretched))
    lab.beyond_s = 55.0
    assert not lab.has_time_for(lab.requests_at(Place(OURS, 0, 0)))


def test_a_point_serves_the_first_requests_for_so_long_or_so_many() -> None:
    lab = make_lab()
    times = (TraceRequest(n / 2, 10, ttft_s=1.0) for n in range(1000))
    lab.samples, lab.point_s = [Trace("t", tuple(times))], 20.0
    for rate_rps in (1.0, 2.0, 10.0):
        requests = lab.requests_at(Place(OURS, 0, lab.index_of(rate_rps)))
        assert len(requests) == pytest.approx(max(20 * rate_rps, POINT_REQUESTS), abs=2)
        assert requests[-1].at_s == pytest.approx((len(requests) - 1) / rate_rps, rel=0.01)


def test_sweep_compares_with_ours_at_equal_places() -> None:
    lab = make_lab()
    rows = sweep(lab, [FIRST, OURS], [lab.index_of(3.0)], [1.0, 0.5])
    first = next(row for row in rows if row["setting"] == str(FIRST) and row["slo_scale"] == 1)
    assert first["attainment"] == pytest.approx(0.4, abs=0.02)
    assert first["ours_minus"] == pytest.approx(0.6, abs=0.02)
    tight = next(row for row in rows if row["setting"] == str(OURS) and row["slo_scale"] == 0.5)
    assert tight["attainment"] == pytest.approx(0.9, abs=0.02)


def test_a_sweep_that_ends_early_tells_of_the_samples_that_all_settings_have() -> None:
    lab = make_lab()
    index = lab.index_of(3.0)
    assert len(lab.samples) > 1
    for place in (Place(FIRST, 0, index), Place(OURS, 0, index), Place(FIRST, 1, index)):
        lab.at(place)
    lab.backend.is_fast, lab.deadline_s = False, time.monotonic()
    for row in sweep(lab, [FIRST, OURS], [index], [1.0]):
        assert row["requests"] == len(lab.samples[0].requests)


class Links(HTMLParser):
    """Collects everything on a page that would be fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag not in ("script", "link", "img", "iframe")
        self.found += [str(given[name]) for name in ("src", "href") if name in given]


def run(tmp_path: Path, *flags: str) -> dict[str, Any]:
    report = tmp_path / "goodput.json"
    assert cli.main(["bench", "goodput", "--quick", "--json", str(report), *flags]) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    return found


@pytest.mark.slow
def test_quick_simulation_reports_rates_and_draws_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--out", str(tmp_path), "--resume", str(tmp_path / "r.json"))
    found = run(tmp_path, *flags)
    rows = {(row["setting"], row["target"]): row for row in found["rows"]}
    ours, first = rows["slack_edf+budget:2", 0.9], rows["fcfs+none", 0.9]
    assert ours["ratio_to_fcfs"] > 1.5
    assert first["ratio_to_fcfs"] == pytest.approx(1.0)
    assert 0.5 < ours["share_of_clairvoyant"] < 1.1
    assert 0.5 < ours["share_of_requests"] < 1.1
    assert found["settings"]["seeds"] == [1, 2]
    for row in found["calibration"]:
        assert row["heuristic"] <= row["bound_solo"] <= row["requests"]
    text = (tmp_path / "goodput.html").read_text()
    links = Links()
    links.feed(text)
    assert links.found == []
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"https?://", text)
    assert text.count("<svg") >= 5
    assert (tmp_path / "attainment-by-rate.png").stat().st_size > 10_000
    assert "Highest rates" in capsys.readouterr().out
    # Resumed, nothing is measured again and the figures are the same.
    again = run(tmp_path, *flags)
    assert again["rows"] == found["rows"]
    assert "measurements are in" in capsys.readouterr().err


def test_given_rates_are_measured_and_no_others(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    command = ["bench", "goodput", "--requests", "60", "--samples", "3", "--rates", "2", "4"]
    command += ["--setting", "fcfs+none", "--setting", str(OURS), "--json", str(target)]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    report = json.loads(target.read_text())
    assert [(row["setting"], round(row["rate_rps"])) for row in report["rows"]] == [
        ("fcfs+none", 2), (str(OURS), 2), ("fcfs+none", 4), (str(OURS), 4),
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["ours_minus_low"] <= row["ours_minus"] <= row["ours_minus_high"]
        assert row["requests"] == report["rows"][0]["requests"]  # paired
    assert "At these rates" in (tmp_path / "goodput.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backend", "gpu"], "expected sim, engine or a http:// URL"),
        (["--target", "1.5"], "target: got 1.5"),
        (["--setting", "fcfs"], "expected POLICY+GRANULARITY"),
        (["--slo-scale", "0"], "slo_scale: got 0.0"),
        (["--loads", "0"], "loads: got 0.0"),
        (["--rates", "-2"], "rates: got -2.0, expected numbers in (0, 1e+06]"),
        (["--rate-step", "1"], "rate_step: got 1.0, expected a ratio"),
        (["--point-s", "-1"], "point_s: got -1.0"),
        (["--ours", "mine"], "expected POLICY+GRANULARITY"),
        (["--backend", "http://localhost:1", "--setting", "fcfs+none"], "has its own"),
        (["--objectives", "mine"], "expected one of qwen-8b"),
        (["--guess-profile", "x"], "profile: got 'x', expected MODEL@MACHINE"),
        (["--backend", "httpx"], "backend: got 'httpx'"),
        (["--backend", "http://localhost:x"], "--backend: got 'http://localhost:x'"),
        (["--backend", "http://localhost:1", "--vocab-size", "0"], "vocab_size: got 0"),
        (["--format", "xml"], "format: got 'xml', expected one of auto, qwen"),
        (["--start-s", "1e9"], "no requests, expected at least one"),
        (["--out", "/dev/null"], "out: got '/dev/null', expected a folder (File exists)"),
    ],
)
def test_bad_flags_are_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "goodput", "--quick", *flags]) == 2
    assert message in capsys.readouterr().err


def test_server_that_is_not_there_is_told_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["bench", "goodput", "--quick", "--backend", "http://127.0.0.1:9"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "http://127.0.0.1:9: " in line
    assert "refused" in line


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.02, 50.0, is_log=True) == [0.1, 1, 10]
    assert ticks(1.0, 30.0, is_log=True) == [1, 2, 5, 10, 20]


def test_cumulative_ends_at_one() -> None:
    points = cumulative([float(one.prompt_tokens) for one in synthetic_trace(1, 900).requests])
    assert points[-1][1] == 1.0
    assert points == sorted(points)
    assert len(points) < 300
