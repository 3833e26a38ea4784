"""Short prompts that arrive while a long one is prefilled; measured by `hol` and the demo.

One *round* is the same for every granularity: the same random prompts at the same times. Arrivals
are open loop: the waits between them are uniformly distributed and do not depend on the answers,
so short prompts pile up where a boundary is far away, as users would.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from flowprefill.bench.common import FIRST_TOKEN_ONLY, first_token_s, random_ids
from flowprefill.engine import Engine
from flowprefill.engine.handle import Handle
from flowprefill.engine.records import TimelineEntry
from flowprefill.request import SLO, Request

JITTER = 0.5  # a wait is uniform in mean * (1 +- this)
LONG_ID, LONG_RUN = "long", "prefill long"  # the request, and its run in the timeline
ALONE_SHORTS = 12  # measured before each round


@dataclass(frozen=True, slots=True)
class Workload:
    """What is submitted in a round.

    Attributes:
        long_tokens: length of the long prompt.
        short_tokens: length of each short prompt.
        shorts: how many short prompts.
        short_slo: their objective; must be feasible alone, else it cannot be urgent.
        long_slo: loose, so that the long one never becomes urgent.
    """

    long_tokens: int
    short_tokens: int
    shorts: int
    short_slo: SLO
    long_slo: SLO = field(default_factory=lambda: SLO(ttft=600.0, service_class="long"))


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered prompt; seconds on the monotonic clock, or lengths of time.

    Attributes:
        submitted_s: when `submit` was called.
        started_s: when its first segment started.
        ttft_s: from submit to its first token.
        suspended_s: how long it was suspended.
    """

    request_id: str
    submitted_s: float
    started_s: float
    ttft_s: float
    suspended_s: float

    @property
    def answered_s(self) -> float:
        """When its first token came."""
        return self.submitted_s + self.ttft_s


@dataclass(frozen=True, slots=True)
class Round:
    """What one round of one granularity measured.

    Attributes:
        granularity: how prefills were cut.
        short_alone_s: TTFT of short prompts on an idle engine.
        long_alone_s: TTFT of the long prompt on an idle engine.
        long: the long prompt, during which short ones arrived.
        shorts: those, in order of arrival; at least one, and only while the long one was live: of
            the same prompts, a granularity that is sooner done has fewer.
        segments: what the executor did meanwhile.
        tokens: prompt tokens of the long one and of `shorts` together.
    """

    granularity: str
    short_alone_s: list[float]
    long_alone_s: float
    long: Answer
    shorts: list[Answer]
    segments: list[TimelineEntry]
    tokens: int

    @property
    def elapsed_s(self) -> float:
        """From the long prompt's submit to the last first token of all; never idle meanwhile."""
        return max(a.answered_s for a in (self.long, *self.shorts)) - self.long.submitted_s

    def blocking_s(self, count: int | None = None) -> list[float]:
        """Return the blocking times of all or the first short prompts, see `blocking_times`."""
        arrivals_s = [short.submitted_s for short in self.shorts[:count]]
        return blocking_times(arrivals_s, self.segments, LONG_RUN)


def blocking_times(
    arrivals_s: Sequence[float], segments: Sequence[TimelineEntry], long_name: str
) -> list[float]:
    """Return how long the long prompt kept the device after each arrival.

    Counted for every short prompt that arrives while a segment of the long one executes: from just
    before its `submit` to the start of the first segment that is not the long one's. So it holds
    the rest of the executing segment, the submit call, the decision and the switch; a little more
    than from dispatch to first segment.

    Args:
        arrivals_s: when submit was called.
        segments: the executor's timeline, oldest first.
        long_name: what the timeline calls the long prompt's run.
    """
    last = last_segments(arrivals_s, segments, long_name)
    return [
        segments[index + 1].start_s - arrival_s
        for arrival_s, index in last
        if index + 1 < len(segments)
    ]


def last_segments(
    times_s: Sequence[float], segments: Sequence[TimelineEntry], run_name: str
) -> list[tuple[float, int]]:
    """Return each time at which a segment of the run executes, and the last of those in a row.

    Args:
        times_s: of interest; others than those are left out.
        segments: the executor's timeline, oldest first.
        run_name: what the timeline calls the run.

    Returns:
        The time, and the index of the run's last segment before another run's.
    """
    starts = [segment.start_s for segment in segments]
    found = []
    for time_s in times_s:
        index = bisect_right(starts, time_s) - 1
        if index < 0 or segments[index].run != run_name or segments[index].end_s < time_s:
            continue
        while index + 1 < len(segments) and segments[index + 1].run == run_name:
            index += 1
        found.append((time_s, index))
    return found


def arrival_offsets(rng: random.Random, count: int, span_s: float) -> list[float]:
    """Return when each short prompt arrives after the long one, seconds; waits are uniform."""
    mean_s = span_s / (count + 1)
    offsets, at = [], 0.0
    for _ in range(count):
        at += mean_s * rng.uniform(1 - JITTER, 1 + JITTER)
        offsets.append(at)
    return offsets


def measure_round(
    engine: Engine, granularity: str, workload: Workload, span_s: float, seed: int
) -> Round:
    """Measure one granularity once: short prompts alone, the long one alone, then together.

    Args:
        engine: idle.
        span_s: the short prompts arrive within it, seconds.
        seed: of prompts and arrival times.
    """
    engine.set_granularity(granularity)
    rng = random.Random(seed)

    def ids(tokens: int) -> list[int]:
        return random_ids(rng, tokens, engine.vocab_size)

    first_token_s(engine, ids(workload.short_tokens))  # first use of this granularity's shapes
    short_alone_s = []
    for _ in range(min(ALONE_SHORTS, workload.shorts)):
        time.sleep(rng.uniform(0.0, 0.02))
        short_alone_s.append(first_token_s(engine, ids(workload.short_tokens), workload.short_slo))
    long_alone_s = first_token_s(engine, ids(workload.long_tokens), workload.long_slo)
    prompts = [ids(workload.short_tokens) for _ in range(workload.shorts)]
    offsets = arrival_offsets(rng, workload.shorts, span_s)
    long, shorts = _together(engine, workload, ids(workload.long_tokens), prompts, offsets)
    since_s = long.submitted_s
    return Round(
        granularity=granularity,
        short_alone_s=short_alone_s,
        long_alone_s=long_alone_s,
        long=long,
        shorts=shorts,
        segments=[entry for entry in engine.timeline() if entry.start_s >= since_s],
        tokens=workload.long_tokens + len(shorts) * workload.short_tokens,
    )


def _together(
    engine: Engine,
    workload: Workload,
    long_ids: list[int],
    prompts: list[list[int]],
    offsets: list[float],
) -> tuple[Answer, list[Answer]]:
    start_s = time.monotonic()
    long = engine.submit(Request(long_ids, FIRST_TOKEN_ONLY, id=LONG_ID), workload.long_slo)
    shorts: list[tuple[float, Handle]] = []
    for number, (prompt, offset) in enumerate(zip(prompts, offsets, strict=True), start=1):
        request = Request(prompt, FIRST_TOKEN_ONLY, id=f"short-{number}")
        time.sleep(max(start_s + offset - time.monotonic(), 0.0))
        if shorts and long.done:  # faster than before: the rest would come too late
            break
        submitted_s = time.monotonic()
        shorts.append((submitted_s, engine.submit(request, workload.short_slo)))
    return _answer(start_s, long), [_answer(at, handle) for at, handle in shorts]


def _answer(submitted_s: float, handle: Handle) -> Answer:
    timings = handle.result(600).timings
    assert timings.ttft is not None
    return Answer(
        request_id=handle.request_id,
        submitted_s=submitted_s,
        started_s=submitted_s + timings.queue,
        ttft_s=timings.ttft,
        suspended_s=timings.suspended,
    )
