"""Makes rounds as `measure_round` would measure them, with exact times; for this folder's tests."""

from __future__ import annotations

from flowprefill.bench.mixed_round import LONG_RUN, Answer, Round
from flowprefill.engine.records import TimelineEntry


def segment(run: str, start_s: float, end_s: float) -> TimelineEntry:
    """One executed segment."""
    return TimelineEntry(run, 1, "o_proj L3 [0, 64)", start_s, end_s, end_s - start_s)


def answer(name: str, at_s: float, waits_s: float, runs_s: float) -> Answer:
    """A prompt that waits, then runs."""
    return Answer(name, at_s, at_s + waits_s, waits_s + runs_s, 0.0)


def make_round(granularity: str, waits_s: float) -> Round:
    """A long prompt of 10 s from time 100 on; a short one at 102 that waits and runs 1 s."""
    boundary_s = 102 + waits_s
    return Round(
        granularity=granularity,
        short_alone_s=[1.0, 1.0],
        long_alone_s=10.0,
        long=answer("long", 100.0, 0.0, 11.0 if waits_s < 8 else 10.0),
        shorts=[answer("short-1", 102.0, waits_s, 1.0)],
        segments=[
            segment(LONG_RUN, 100.0, boundary_s),
            segment("prefill short-1", boundary_s, boundary_s + 1),
            *([segment(LONG_RUN, boundary_s + 1, 111.0)] if boundary_s < 110 else []),
        ],
        tokens=1100,
    )
