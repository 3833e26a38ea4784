"""What `bench load` sends and when: a random mix of service classes, or a trace from a file."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flowprefill.traces import (
    TraceRequest,
    clipped,
    objectives_for,
    read_trace,
    scaled_lengths,
    scaled_rate,
    with_objectives,
)

# Service class -> objectives, as the server's configuration takes them.
Classes = Mapping[str, Mapping[str, float]]
MIX_CLASSES: Classes = {
    "interactive": {"ttft_ms": 500, "tpot_ms": 200},
    "document": {"ttft_ms": 4_000, "tpot_ms": 300},
    "batch": {"ttft_ms": 30_000},
}
# Share of requests, range of prompt tokens.
MIX = {"interactive": (0.67, 32, 256), "document": (0.25, 257, 1500), "batch": (0.08, 1501, 4000)}
MIX_OUTPUT_TOKENS = (1, 24)
MAX_CANCEL_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Planned:
    """One request to send.

    Attributes:
        at_s: when, seconds after the start.
        cancel_after_s: the client goes away so long after sending; None: it stays.
        slo: objectives as the API takes them; None: those of its class at the server.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    service_class: str
    cancel_after_s: float | None = None
    slo: Mapping[str, float] | None = None


def random_mix(rng: random.Random, count: int, rate: float, cancelled: float) -> list[Planned]:
    """Plan requests of random class, length and time.

    Args:
        rate: requests per second, with exponentially distributed gaps; 0: all at once.
        cancelled: share of requests whose client goes away.
    """
    names = list(MIX)
    shares = [MIX[name][0] for name in names]
    at_s, planned = 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate) if rate else 0.0
        name = rng.choices(names, shares)[0]
        _, least, most = MIX[name]
        leaves = rng.random() < cancelled
        planned.append(
            Planned(
                at_s,
                rng.randint(least, most),
                rng.randint(*MIX_OUTPUT_TOKENS),
                name,
                rng.uniform(0.0, MAX_CANCEL_AFTER_S) if leaves else None,
            )
        )
    return planned


def trace_plan(
    path: Path, length_scale: float, time_scale: float, max_tokens: int
) -> tuple[list[Planned], Classes]:
    """Read a trace that `flowprefill.traces.read_trace` knows.

    Args:
        length_scale: prompt and output lengths are multiplied by it.
        time_scale: gaps between arrivals are multiplied by it.
        max_tokens: longer prompts (with their output) are cut to it.

    Returns:
        The requests, and the TTFT objectives of their classes (see `objectives_for`).

    Raises:
        ConfigError: a row is bad; names file, line and field.
    """
    trace = read_trace(path)
    objectives = objectives_for(trace)
    trace = with_objectives(trace, objectives)  # by the trace's own lengths
    trace = clipped(scaled_rate(scaled_lengths(trace, length_scale), 1 / time_scale), max_tokens)
    classes = {name: {"ttft_ms": one.ttft_s * 1e3} for name, one in objectives.classes.items()}
    return [planned_of(request) for request in trace.requests], classes


def planned_of(request: TraceRequest) -> Planned:
    """Return a trace's request as one to send."""
    return Planned(
        request.at_s, request.prompt_tokens, request.output_tokens, request.service_class
    )
