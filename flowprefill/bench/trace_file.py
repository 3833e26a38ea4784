"""Writes what the executor did in some rounds as a Chrome trace, for ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowprefill.bench.mixed_round import LONG_RUN, Answer, Round

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
    start_s = one.long.submitted_s
    events = [_named("process_name", f"granularity {one.granularity}", process, 0)]
    rows = {LONG_RUN: LONG_ROW}
    events.append(_named("thread_name", "long prompt", process, LONG_ROW))
    for row, short in enumerate(one.shorts, start=1):
        rows[f"prefill {short.request_id}"] = row
        events.append(_named("thread_name", short.request_id, process, row))
        events.append(_waiting(short, start_s, process, row))
    for segment in one.segments:
        row = rows.get(segment.run, PACKED_ROW)
        event = _span(segment.segment, segment.start_s, segment.end_s, start_s)
        request = segment.run.removeprefix("prefill ")
        details = {"request": request, "predicted_ms": round(segment.predicted_s * 1e3, 3)}
        events.append(event | {"pid": process, "tid": row, "args": details})
    if any(segment.run not in rows for segment in one.segments):
        events.append(_named("thread_name", "several short prompts", process, PACKED_ROW))
    return events


def _waiting(short: Answer, start_s: float, process: int, row: int) -> Event:
    details = {"ttft_ms": round(short.ttft_s * 1e3, 3)}
    event = _span("waiting", short.submitted_s, short.started_s, start_s)
    return event | {"pid": process, "tid": row, "args": details}


def _span(name: str, begin_s: float, end_s: float, zero_s: float) -> Event:
    return {
        "name": name,
        "ph": "X",
        "ts": round((begin_s - zero_s) * 1e6, 1),
        "dur": round(max(end_s - begin_s, 0.0) * 1e6, 1),
    }


def _named(kind: str, name: str, process: int, row: int) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": row, "args": {"name": name}}
