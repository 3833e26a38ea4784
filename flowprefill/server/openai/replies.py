"""Parts of replies that both generating endpoints share: usage, metrics, the envelope."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowprefill.request import Timings
from flowprefill.server.engine_protocol import ServedHandle


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def long_json(payload: Any) -> str:
    """Encode a long reply; in a thread, from which the event loop can take the GIL meanwhile.

    json.dumps is C and would keep it to the end; iterencode is Python, and takes twice as long.
    """
    return "".join(json.JSONEncoder().iterencode(payload))


def metrics_object(timings: Timings, output_tokens: int) -> dict[str, Any]:
    """Return the opt-in per-request timings; milliseconds, null where there was none."""
    generation_s = None if timings.ttft is None else max(timings.total - timings.ttft, 0.0)
    rate = None
    if generation_s and output_tokens > 1:
        rate = round((output_tokens - 1) / generation_s, 3)
    return {
        "queue_time_ms": _ms(timings.queue),
        "preprocess_time_ms": _ms(timings.preprocess),
        "waiting_time_ms": _ms(timings.waiting),
        "prefill_run_ms": _ms(timings.prefill_run),
        "suspended_ms": _ms(timings.suspended),
        "preemptions": timings.preemptions,
        "time_to_first_token_ms": _ms(timings.ttft),
        "predicted_ttft_ms": _ms(timings.predicted_ttft),
        "generation_time_ms": _ms(generation_s),
        "mean_itl_ms": _ms(timings.mean_itl),
        "tokens_per_second": rate,
        "total_time_ms": _ms(timings.total),
        "slo_met": timings.slo_met,
    }


def usage_object(
    handles: Sequence[ServedHandle],
    n: int,
    output_tokens: int,
    reasoning_tokens: int | None = None,
) -> dict[str, Any]:
    """Return the token counts of one HTTP request; a prompt with ``n`` choices counts once.

    Args:
        reasoning_tokens: those of the output that are reasoning; None where there is never any.
    """
    firsts = handles[::n]
    prompt_tokens = sum(handle.prompt_tokens for handle in firsts)
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(handle.cached_tokens for handle in firsts)},
    }
    if reasoning_tokens is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return usage


def total_reasoning(counts: Iterable[int | None]) -> int | None:
    """Return the reasoning tokens of all choices; None where there is never any."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields around the choices, the same in every event of one reply.

    Attributes:
        id: also the request's id in the engine, with ``-<choice>`` when there are several.
        created: seconds since the epoch.
    """

    id: str
    model: str
    system_fingerprint: str
    service_tier: str | None
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a reply or an event holding ``choices``."""
        payload: dict[str, Any] = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
        }
        if self.service_tier is not None:
            payload["service_tier"] = self.service_tier
        return payload


def new_reply_id(prefix: str) -> str:
    """Return a fresh reply id; never the client's x-request-id, which may come twice."""
    return prefix + uuid.uuid4().hex[:24]
