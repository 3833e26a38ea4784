"""The exported timeline: no two slices of one row overlap, however a viewer reads the numbers."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowprefill.engine.records import TimelineEntry
from flowprefill.server.observe.debug_routes import chrome_trace

# How viewers turn the text of a time in microseconds into whole nanoseconds.
READERS: dict[str, Callable[[str], int]] = {
    "truncates the double": lambda text: int(float(text) * 1000.0),
    "rounds the double": lambda text: round(float(text) * 1000.0),
    "floors the double": lambda text: math.floor(float(text) * 1e3),
    "reads the digits": lambda text: int(Decimal(text) * 1000),
}
RUNS = st.sampled_from(["prefill a", "prefill b", "decode of 1", "decode of 2", "prefill of 3"])
SECONDS = st.floats(0.0, 5e-3, allow_nan=False)


@st.composite
def timelines(draw: st.DrawFn) -> list[TimelineEntry]:
    """Segments one after another, with and without pauses; clocks may disagree by a little."""
    at = draw(st.floats(0.0, 3e7))  # a year of uptime
    entries = []
    for _ in range(draw(st.integers(1, 40))):
        at += draw(st.sampled_from([0.0, 0.0, 1e-9, 1e-7, 3.3e-6, 1e-3]))
        start = at - draw(st.sampled_from([0.0, 0.0, 0.0, 1e-7]))
        at += draw(SECONDS)
        entries.append(TimelineEntry(draw(RUNS), 0, "operator", start, at, 0.0))
    return entries


def slices_of(entries: list[TimelineEntry], read: Callable[[str], int]) -> list[dict[str, Any]]:
    """Return the slices as a viewer sees them: from the text, in whole nanoseconds."""
    text = json.dumps(chrome_trace(entries))
    trace = json.loads(text, parse_float=str, parse_int=str)
    found = []
    for one in trace["traceEvents"]:
        if one["ph"] == "X":
            begin = read(one["ts"])
            assert begin >= 0
            found.append({"row": one["tid"], "begin": begin, "end": begin + read(one["dur"])})
    return found


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@given(entries=timelines())
def test_slices_of_a_row_never_overlap_and_stay_where_they_were(
    read: Callable[[str], int], entries: list[TimelineEntry]
) -> None:
    slices = slices_of(entries, read)
    assert len(slices) == len(entries)
    last_end: dict[str, int] = {}
    origin_s = chrome_trace(entries)["otherData"]["origin_s"]
    for one, entry in zip(slices, entries, strict=True):
        assert last_end.get(one["row"], 0) <= one["begin"] <= one["end"]
        last_end[one["row"]] = one["end"]
        # Within the grid, the disagreement of the clocks, and what a double of seconds can tell.
        slack = 200 + math.ulp(entry.end_s) * 2e9
        assert abs(one["begin"] - (entry.start_s - origin_s) * 1e9) <= slack
        assert abs(one["end"] - (entry.end_s - origin_s) * 1e9) <= slack


def test_neighbours_touch() -> None:
    edges = [1234.5 + n * 0.00213437 for n in range(200)]
    pairs = itertools.pairwise(edges)
    entries = [TimelineEntry("prefill a", 1, "op", a, b, 0.0) for a, b in pairs]
    for read in READERS.values():
        slices = slices_of(entries, read)
        assert all(a["end"] == b["begin"] for a, b in itertools.pairwise(slices))


@given(entries=st.lists(st.tuples(RUNS, SECONDS, SECONDS), min_size=1, max_size=20))
def test_whatever_the_times_no_slice_is_negative_or_overlaps(
    entries: list[tuple[str, float, float]],
) -> None:
    made = [TimelineEntry(run, 1, "op", start, end, 0.0) for run, start, end in entries]
    last_end: dict[str, int] = {}
    for one in slices_of(made, READERS["truncates the double"]):
        assert last_end.get(one["row"], 0) <= one["begin"] <= one["end"]
        last_end[one["row"]] = one["end"]
