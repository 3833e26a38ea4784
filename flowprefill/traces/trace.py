"""Trace: the requests of one workload in order of arrival, with lengths, classes and objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowprefill.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        at_s: when it arrives, seconds from the start of the trace.
        prompt_tokens: length of the prompt, at least 1.
        output_tokens: tokens to generate, at least 1; 1 is prefill only.
        service_class: its class in the trace; empty where the trace knows none.
        ttft_s: objective for the time to first token, seconds; inf is best effort.
        tpot_s: objective for the time per output token after the first, seconds; inf is none.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int = 1
    service_class: str = ""
    ttft_s: float = math.inf
    tpot_s: float = math.inf

    def __post_init__(self) -> None:
        if not (math.isfinite(self.at_s) and self.at_s >= 0):
            raise ConfigError(f"at_s: got {self.at_s}, expected seconds >= 0")
        for name in ("prompt_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected an integer >= 1")
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected seconds > 0")


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests by arrival.

    Attributes:
        name: for reports.
        requests: at least one; `at_s` never decreases.
    """

    name: str
    requests: tuple[TraceRequest, ...]

    def __post_init__(self) -> None:
        if not self.requests:
            raise ConfigError(f"trace {self.name}: no requests, expected at least one")
        for before, after in zip(self.requests, self.requests[1:], strict=False):
            if after.at_s < before.at_s:
                raise ConfigError(f"trace {self.name}: {after.at_s} s comes after {before.at_s} s")

    @property
    def span_s(self) -> float:
        """Time from the first arrival to the last, seconds."""
        return self.requests[-1].at_s - self.requests[0].at_s

    @property
    def rate_rps(self) -> float:
        """Mean arrivals per second over the span; inf when all arrive at once."""
        return (len(self.requests) - 1) / self.span_s if self.span_s > 0 else math.inf
