"""The demo's picture and trace, drawn from rounds with exact times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rounds import make_round

from flowprefill.bench.picture import merged, seconds_text
from flowprefill.bench.trace_file import write_trace


def test_trace_has_a_process_per_round_and_a_row_per_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace([make_round("none", 8.0), make_round("budget:2", 0.5)], path)
    events = json.loads(path.read_text())["traceEvents"]
    named = {(e["pid"], e["tid"], e["args"]["name"]) for e in events if e["ph"] == "M"}
    assert {(1, 0, "granularity none"), (2, 0, "granularity budget:2")} <= named
    assert (2, 1, "short-1") in named
    spans = [e for e in events if e["ph"] == "X" and e["pid"] == 2]
    waiting = next(e for e in spans if e["name"] == "waiting")
    assert (waiting["ts"], waiting["dur"], waiting["tid"]) == (2e6, 0.5e6, 1)
    runs = [e for e in spans if e["name"] != "waiting"]
    assert [(e["tid"], e["ts"], e["dur"]) for e in runs] == [
        (0, 0.0, 2.5e6),
        (1, 2.5e6, 1e6),
        (0, 3.5e6, 7.5e6),
    ]
    assert runs[0]["args"]["request"] == "long"


@pytest.mark.parametrize("waits_s", [0.1234567891, 1 / 3, 0.00001234])
def test_slices_of_one_row_touch_as_a_viewer_counts(tmp_path: Path, waits_s: float) -> None:
    path = tmp_path / "trace.json"
    write_trace([make_round("budget:2", waits_s)], path)
    spans = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    waiting, short = (e for e in spans if e["tid"] == 1)
    assert int(waiting["ts"] * 1000.0) + int(waiting["dur"] * 1000.0) == int(short["ts"] * 1000.0)


def test_merged_joins_what_touches() -> None:
    assert merged([(0, 1), (1.05, 2), (2.5, 3)], 0.1) == [(0, 2), (2.5, 3)]
    assert merged([], 1.0) == []


@pytest.mark.parametrize(("seconds", "text"), [(0.0615, "62 ms"), (8.26, "8.3 s"), (1.0, "1.0 s")])
def test_times_read_as_people_say_them(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.slow
def test_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from flowprefill.bench.picture import draw

    path = tmp_path / "demo.png"
    draw(make_round("none", 8.0), make_round("budget:2", 0.5), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
