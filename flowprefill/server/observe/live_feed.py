"""LiveFeed: the last seconds of the engine in a few kilobytes, for the page at /.

page_routes.py asks it when a page does; between two questions it does nothing but keep the outcome
of each ended request. One answer serves every page that asks within FRESH_S.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowprefill.engine.records import CALIBRATION

if TYPE_CHECKING:
    from flowprefill.engine.records import EngineStats, RequestRecord, TimelineEntry
    from flowprefill.server.engine_protocol import ServedEngine

WINDOW_S = 10.0  # of the timeline
OUTCOMES_S = 60.0  # of TTFT and goodput
FRESH_S = 0.2
MAX_SEGMENTS = 8192  # read at once; a page that was just opened starts with that many
MAX_BARS = 400
MAX_PREEMPTIONS = 50
MAX_OUTCOMES = 4096
MAX_CLASSES = 16
MAX_TEXT = 120
GAP_S = 0.01  # a pixel or so; between decode steps, and where a prefill lets one of them go first
DECODE_ROW = -1


@dataclass(slots=True)
class Bar:
    """A stretch for which the executor worked on one run, or on decode steps."""

    run: int
    name: str
    start_s: float
    end_s: float
    prompt_tokens: int | None = None

    @property
    def row(self) -> int:
        """Which it is drawn in: its run's, or the one of all decode steps."""
        return DECODE_ROW if self.name.startswith("decode") else self.run

    def as_json(self) -> dict[str, Any]:
        """Return it for the page; seconds on the server's clock."""
        name = "decode" if self.row == DECODE_ROW else self.name[:MAX_TEXT]
        times = {"start_s": round(self.start_s, 4), "end_s": round(self.end_s, 4)}
        return {"row": self.row, "name": name, "prompt_tokens": self.prompt_tokens, **times}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one ended request; met: None without an objective."""

    at_s: float
    service_class: str
    ttft_s: float | None
    objective_s: float | None
    met: bool | None


class LiveFeed:
    """What the page shows; `text` from any thread, `on_end` from the engine's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bars: deque[Bar] = deque(maxlen=MAX_BARS)
        self._last: dict[int, Bar] = {}  # of each row
        self._outcomes: deque[Outcome] = deque(maxlen=MAX_OUTCOMES)
        self._cursor = 0
        self._made_s = -FRESH_S
        self._text = ""

    # ---- told by the engine --------------------------------------------------------------------

    def on_end(self, record: RequestRecord) -> None:
        """Keep what came of a request; a cancelled one says nothing about its objective."""
        if record.finish_reason == "cancelled":
            return
        slo, timings = record.slo, record.timings
        name = slo.service_class[:MAX_TEXT]
        outcome = Outcome(time.monotonic(), name, timings.ttft, slo.ttft, timings.slo_met)
        self._outcomes.append(outcome)

    def on_preemption(self, reason: str, ack_s: float) -> None:
        """Nothing: the log of decisions says more."""

    def on_decision(self, seconds: float) -> None:
        """Nothing: the page shows what came of it."""

    # ---- asked by the page ---------------------------------------------------------------------

    def text(self, engine: ServedEngine) -> str:
        """Return the state as JSON, at most FRESH_S old.

        Cost: O(segments since the last answer), at most MAX_SEGMENTS, and O(MAX_OUTCOMES).
        """
        with self._lock:
            now = time.monotonic()
            if now - self._made_s >= FRESH_S:
                self._text = json.dumps(self._state(engine, now), separators=(",", ":"))
                self._made_s = now
            return self._text

    def _state(self, engine: ServedEngine, now: float) -> dict[str, Any]:
        stats = engine.stats()
        since = max(self._cursor, stats.segments - MAX_SEGMENTS)
        entries = engine.timeline(since)
        self._cursor = since + len(entries)
        self._join(engine, entries)
        bars = [bar for bar in self._bars if bar.end_s >= now - WINDOW_S]
        self._last = {bar.row: bar for bar in bars}
        outcomes = [one for one in list(self._outcomes) if one.at_s >= now - OUTCOMES_S]
        return {
            "now_s": round(now, 4),
            "window_s": WINDOW_S,
            "outcomes_s": OUTCOMES_S,
            "max_model_len": engine.max_model_len,
            "configured_classes": sorted(engine.config.classes)[:MAX_CLASSES],
            "bars": [bar.as_json() for bar in bars],
            "preemptions": preemptions(engine.decisions(), now),
            "classes": classes(outcomes),
            "goodput": goodput(outcomes),
            "engine": _engine_state(stats),
        }

    def _join(self, engine: ServedEngine, entries: Sequence[TimelineEntry]) -> None:
        """Add segments to the bars: a run's pause that no eye could see does not end its bar."""
        lengths: dict[str, int | None] | None = None  # looked up if there is a new prefill
        for entry in entries:
            if entry.run == CALIBRATION:
                continue
            bar = Bar(entry.run_id, entry.run, entry.start_s, entry.end_s)
            last = self._last.get(bar.row)
            if last is not None and entry.start_s - last.end_s < GAP_S:
                last.end_s = max(last.end_s, entry.end_s)
                continue
            if last is not None:
                bar.prompt_tokens = last.prompt_tokens
            elif bar.row != DECODE_ROW:
                lengths = _prompt_lengths(engine) if lengths is None else lengths
                bar.prompt_tokens = lengths.get(bar.name)
            self._last[bar.row] = bar
            self._bars.append(bar)


def _prompt_lengths(engine: ServedEngine) -> dict[str, int | None]:
    """Return the prompt tokens of the last requests by what the timeline calls their prefills."""
    return {f"prefill {one['id']}": one.get("prompt_tokens") for one in engine.recent_requests()}


def preemptions(decisions: Iterable[dict[str, Any]], now: float) -> list[dict[str, Any]]:
    """Return the last decisions that suspended a run, oldest first."""
    found = [
        {
            "at_s": round(one["time_s"], 4),
            "row": one["preempted"],
            "by": DECODE_ROW if one["kind"] == "decode" else one["dispatch"],
            "reason": one["reason"][:MAX_TEXT],
        }
        for one in decisions
        if one.get("preempted") is not None and one["time_s"] >= now - WINDOW_S
    ]
    return found[-MAX_PREEMPTIONS:]


def classes(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Return TTFT against the objective for each service class, by name."""
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.service_class, []).append(one)
    return [_class_state(name, groups[name]) for name in sorted(groups)[:MAX_CLASSES]]


def _class_state(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    ttfts = sorted(one.ttft_s for one in outcomes if one.ttft_s is not None)
    stated = sorted(one.objective_s for one in outcomes if one.objective_s is not None)
    judged = [one.met for one in outcomes if one.met is not None]
    return {
        "name": name,
        "requests": len(outcomes),
        "ttft_p50_ms": _ms_at(ttfts, 0.5),
        "ttft_p95_ms": _ms_at(ttfts, 0.95),
        "slo_ttft_ms": _ms_at(stated, 0.0),
        "slo_requests": len(judged),
        "slo_met": sum(judged),
    }


def _ms_at(values: Sequence[float], share: float) -> float | None:
    """Return the value below which that share lies, as milliseconds; values: sorted seconds."""
    if not values:
        return None
    return round(values[min(int(share * len(values)), len(values) - 1)] * 1e3, 1)


def goodput(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return how many requests with an objective met it, and how many did each second."""
    judged = [one.met for one in outcomes if one.met is not None]
    met = sum(judged)
    return {"met": met, "requests": len(judged), "per_s": round(met / OUTCOMES_S, 2)}


def _engine_state(stats: EngineStats) -> dict[str, int]:
    return {
        "running": stats.running,
        "waiting": stats.waiting,
        "suspended": stats.suspended,
        "kv_blocks_used": stats.kv_blocks_used,
        "kv_blocks_cached": stats.kv_blocks_cached,
        "kv_blocks_total": stats.kv_blocks_total,
    }
