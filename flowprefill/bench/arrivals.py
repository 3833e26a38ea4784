"""What `bench load` sends and when: a random mix of service classes, or a trace from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowprefill.errors import ConfigError

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

# The four kinds of the Qwen-Bailian trace with the objectives of the paper (8B model, one GPU).
TRACE_CLASSES: Classes = {
    "text": {"ttft_ms": 250},
    "image": {"ttft_ms": 500},
    "search": {"ttft_ms": 4_000},
    "file": {"ttft_ms": 6_000},
}


@dataclass(frozen=True, slots=True)
class Planned:
    """One request to send.

    Attributes:
        at_s: when, seconds after the start.
        cancel_after_s: the client goes away so long after sending; None: it stays.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    service_class: str
    cancel_after_s: float | None = None


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


def read_trace(
    path: Path, length_scale: float, time_scale: float, max_tokens: int
) -> list[Planned]:
    """Read a JSONL trace with ``timestamp``, ``input_length``, ``output_length`` and ``type``.

    Args:
        length_scale: prompt and output lengths are multiplied by it.
        time_scale: gaps between arrivals are multiplied by it.
        max_tokens: longer prompts (with their output) are cut to it.

    Raises:
        ConfigError: a line is not such an object; names file, line and what is wrong.
    """
    planned = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            planned.append(
                _planned(line, f"{path}:{number}", (length_scale, time_scale), max_tokens)
            )
    if not planned:
        raise ConfigError(f"trace: {path} is empty", param="trace")
    return planned


def _planned(line: str, where: str, scales: tuple[float, float], max_tokens: int) -> Planned:
    try:
        row: dict[str, Any] = json.loads(line)
        lengths = [float(row[name]) * scales[0] for name in ("input_length", "output_length")]
        kind, at_s = row["type"], float(row["timestamp"]) * scales[1]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"trace: {where}: missing or wrong entry {error}", param="trace"
        ) from None
    if kind not in TRACE_CLASSES:
        known = ", ".join(TRACE_CLASSES)
        raise ConfigError(f"trace: {where}: type {kind!r}, expected one of {known}", param="trace")
    output = max(1, min(round(lengths[1]), max_tokens - 1))
    prompt = max(1, min(round(lengths[0]), max_tokens - output))
    return Planned(at_s, prompt, output, kind)
