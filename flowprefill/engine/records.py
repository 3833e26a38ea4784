"""What the engine tells about itself: statistics, one record per ended request, the timeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from flowprefill.engine.worker import FIRST_PROBE_RUN

if TYPE_CHECKING:
    from flowprefill.engine.worker import TimelineRecord
    from flowprefill.request import SLO, FinishReason, Timings
    from flowprefill.scheduling import Decision, SchedulerEvent


CALIBRATION = "calibration"  # what the timeline calls its runs


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; counters count since start.

    Attributes:
        running: requests whose run is executing or that decode; held ones left out.
        waiting: requests whose prefill has not started, those waiting for KV blocks included.
        suspended: requests whose prefill is suspended.
        held: requests that have a first token and get no more until their clients read.
        kv_blocks_used: blocks held by live requests.
        kv_blocks_cached: blocks that no request holds, reusable by their content.
        prefix_cache_queries: prompt tokens looked up in the prefix cache.
        prefix_cache_hits: prompt tokens found there.
        workspace_bytes: activations of all live runs.
        max_blocking_s: longest time from a dispatch to its first segment.
    """

    running: int
    waiting: int
    suspended: int
    held: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int
    segments: int
    workspace_bytes: int
    max_blocking_s: float


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request at its terminal event.

    Attributes:
        token_gaps_s: seconds between consecutive output tokens.
        cancel_to_free_s: from ``cancel`` to its KV blocks being free; None unless cancelled.
        blocking_s: longest time from a dispatch of its prefill to the segment that then started;
            None if it never started.
    """

    request_id: str
    slo: SLO
    timings: Timings
    finish_reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    token_gaps_s: tuple[float, ...]
    cancel_to_free_s: float | None
    blocking_s: float | None = None


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """One executed segment.

    Attributes:
        run: ``prefill REQUEST``, ``prefill of N``, ``decode of N`` or, before any of these,
            ``calibration``.
        segment: operator, layer and rows.
    """

    run: str
    run_id: int
    segment: str
    start_s: float
    end_s: float
    predicted_s: float


class EngineObserver(Protocol):
    """Called on the engine's threads without its lock; must be quick and must not raise."""

    def on_end(self, record: RequestRecord) -> None:
        """Exactly once per admitted request, after its blocks were freed."""

    def on_preemption(self, reason: str, ack_s: float) -> None:
        """A run was suspended; ``ack_s``: from dispatch to the newcomer's first segment."""

    def on_decision(self, seconds: float) -> None:
        """The scheduler decided once, in so many seconds."""


def decision_entry(event: SchedulerEvent, decision: Decision, now: float) -> dict[str, Any]:
    """Return one entry of the decision log, ready for JSON."""
    work, old = decision.dispatch, decision.preempted
    return {
        "time_s": now,
        "event": type(event).__name__,
        "dispatch": None if work is None else work.id,
        "kind": None if work is None else work.kind,
        "requests": [] if work is None else list(work.job_ids),
        "is_resume": decision.is_resume,
        "preempted": None if old is None else old.id,
        "dropped": [job_id for job_id, _ in decision.dropped],
        "reason": decision.reason,
    }


def timeline_entry(record: TimelineRecord, names: dict[int, str]) -> TimelineEntry:
    """Return a record of the worker's timeline as users see it; names: of runs by id."""
    label = record.label
    is_one_layer = label.last_layer in (label.layer, -1)
    layers = f"{label.layer}" if is_one_layer else f"{label.layer}-{label.last_layer}"
    where = f" L{layers}" if label.layer >= 0 else ""
    is_probe = record.run_id >= FIRST_PROBE_RUN
    return TimelineEntry(
        run=CALIBRATION if is_probe else names.get(record.run_id, f"run {record.run_id}"),
        run_id=record.run_id,
        segment=f"{label.op}{where} [{label.row_begin}, {label.row_end})",
        start_s=record.start_s,
        end_s=record.end_s,
        predicted_s=label.predicted_s,
    )
