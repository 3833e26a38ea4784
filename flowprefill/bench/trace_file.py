"""Writes what the executor did in some rounds as a Chrome trace, for ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowprefill.bench.mixed_round import LONG_RUN, Round
from flowprefill.server.observe.trace_slices import TraceSlices, row_name

Event = dict[str, Any]
LONG_ROW, PACKED_ROW = 0, 1000  # rows are shown in this order; short prompts lie between


def write_trace(rounds: Sequence[Round], path: Path) -> None:
    """Write one process per round, in it one row per request, in it every segment.

    Time zero of each process is the submit of its long prompt, so that they lie one above the
    other. A segment is named by operator, layer and rows; a short prompt's row also shows its wait.
    """
    events: list[Event] = []
    for process, one in enumerate(rounds, start=1):
        events += _events_of(one, process)
    path.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}))


def _events_of(one: Round, process: int) -> list[Event]:
    slices = TraceSlices(one.long.submitted_s)
    events = [row_name("process_name", f"granularity {one.granularity}", process, 0)]
    rows = {LONG_RUN: LONG_ROW}
    events.append(row_name("thread_name", "long prompt", process, LONG_ROW))
    for row, short in enumerate(one.shorts, start=1):
        rows[f"prefill {short.request_id}"] = row
        events.append(row_name("thread_name", short.request_id, process, row))
        wait_s, details = (short.submitted_s, short.started_s), _ms("ttft_ms", short.ttft_s)
        events.append(slices.slice((process, row), "waiting", wait_s, details))
    for segment in one.segments:
        row = rows.get(segment.run, PACKED_ROW)
        request = segment.run.removeprefix("prefill ")
        details = {"request": request, **_ms("predicted_ms", segment.predicted_s)}
        times_s = (segment.start_s, segment.end_s)
        events.append(slices.slice((process, row), segment.segment, times_s, details))
    if any(segment.run not in rows for segment in one.segments):
        events.append(row_name("thread_name", "several short prompts", process, PACKED_ROW))
    return events


def _ms(name: str, seconds: float) -> Event:
    return {name: round(seconds * 1e3, 3)}
