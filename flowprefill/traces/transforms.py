"""Transforms of traces: rate, lengths, windows, resamples. Each returns a new trace. Pure."""

from __future__ import annotations

import random
from bisect import bisect_left
from dataclasses import replace

from flowprefill.errors import ConfigError
from flowprefill.traces.trace import Trace, TraceRequest

BLOCK_S = 10.0  # of time, kept together by a resample


def scaled_rate(trace: Trace, factor: float) -> Trace:
    """Divide every gap between arrivals by a factor > 0: bursts stay bursts."""
    _check_positive("factor", factor)
    return _with(trace, [replace(one, at_s=one.at_s / factor) for one in trace.requests])


def at_rate(trace: Trace, rate_rps: float) -> Trace:
    """Scale the gaps so that requests arrive at a mean rate, requests per second.

    Raises:
        ConfigError: all requests arrive at once, so that no scaling changes that.
    """
    if trace.span_s <= 0:
        raise ConfigError(f"trace {trace.name}: all requests arrive at once, expected a span > 0")
    _check_positive("rate_rps", rate_rps)
    return scaled_rate(trace, rate_rps / trace.rate_rps)


def scaled_lengths(trace: Trace, factor: float) -> Trace:
    """Multiply prompt and output lengths by a factor > 0; none falls below one token."""
    _check_positive("length_scale", factor)

    def scaled(tokens: int) -> int:
        return max(1, round(tokens * factor))

    return _with(
        trace,
        [
            replace(
                one,
                prompt_tokens=scaled(one.prompt_tokens),
                output_tokens=scaled(one.output_tokens),
            )
            for one in trace.requests
        ],
    )


def scaled_objectives(trace: Trace, factor: float) -> Trace:
    """Multiply both objectives of every request by a factor > 0."""
    _check_positive("slo_scale", factor)
    return _with(
        trace,
        [
            replace(one, ttft_s=one.ttft_s * factor, tpot_s=one.tpot_s * factor)
            for one in trace.requests
        ],
    )


def clipped(trace: Trace, max_tokens: int) -> Trace:
    """Cut prompts so that prompt and output together have at most max_tokens (>= 2)."""
    if max_tokens < 2:
        raise ConfigError(f"max_tokens: got {max_tokens}, expected an integer >= 2")
    requests = []
    for one in trace.requests:
        output = min(one.output_tokens, max_tokens - 1)
        prompt = min(one.prompt_tokens, max_tokens - output)
        requests.append(replace(one, prompt_tokens=prompt, output_tokens=output))
    return _with(trace, requests)


def prefill_only(trace: Trace) -> Trace:
    """Set every output length to one token and drop the objective per output token."""
    return _with(
        trace, [replace(one, output_tokens=1, tpot_s=float("inf")) for one in trace.requests]
    )


def window(trace: Trace, start_s: float, length_s: float) -> Trace:
    """Keep what arrives in [start_s, start_s + length_s), shifted so that start_s is 0.

    Raises:
        ConfigError: nothing arrives in it.
    """
    kept = [
        replace(one, at_s=one.at_s - start_s)
        for one in trace.requests
        if start_s <= one.at_s < start_s + length_s
    ]
    return _with(trace, kept)


def resampled(
    trace: Trace, seed: int, block_s: float = BLOCK_S, span_s: float | None = None
) -> Trace:
    """Draw a trace from blocks of time of this one (circular block bootstrap).

    Blocks start at uniformly random times and wrap around at the end, so every moment is equally
    likely and bursts shorter than a block stay whole. Equal seeds give equal samples: compare
    policies on the same ones.

    Args:
        block_s: length of a block, seconds > 0; cut to both spans.
        span_s: of the sample, seconds > 0, may be longer than the trace's, which is the default.
            Of a trace whose requests arrive at once the sample is the trace itself.

    Source: Politis and Romano, A circular block-resampling procedure for stationary data, 1992.
    """
    if trace.span_s <= 0:
        return trace
    span_s = trace.span_s if span_s is None else span_s
    _check_positive("block_s", block_s)
    _check_positive("span_s", span_s)
    rng = random.Random(seed)
    block_s = min(block_s, span_s, trace.span_s)
    requests: list[TraceRequest] = []
    begin_s = 0.0
    while begin_s < span_s:
        length_s = min(block_s, span_s - begin_s)
        requests += _block(trace, rng.uniform(0.0, trace.span_s), length_s, begin_s)
        begin_s += block_s
    return _with(trace, requests or list(trace.requests))


def resampled_requests(trace: Trace, seed: int, block_requests: int) -> Trace:
    """Draw as many requests as the trace has, in blocks of consecutive ones with their gaps.

    As `resampled`, but the number of requests is kept instead of the span.
    """
    if block_requests < 1:
        raise ConfigError(f"block_requests: got {block_requests}, expected an integer >= 1")
    rng = random.Random(seed)
    given, count = trace.requests, len(trace.requests)
    mean_gap_s = trace.span_s / max(1, count - 1)
    requests: list[TraceRequest] = []
    at_s = 0.0
    while len(requests) < count:
        first = rng.randrange(count)
        for offset in range(min(block_requests, count - len(requests))):
            index = (first + offset) % count
            # The first has no gap before it, nor has one that follows the last around the end.
            gap_s = given[index].at_s - given[index - 1].at_s if index else mean_gap_s
            at_s += gap_s if requests else 0.0
            requests.append(replace(given[index], at_s=at_s))
    return _with(trace, requests)


def _block(trace: Trace, start_s: float, length_s: float, begin_s: float) -> list[TraceRequest]:
    """Return what arrives in [start_s, start_s + length_s), wrapped, moved to begin_s."""
    zero_s, span_s = trace.requests[0].at_s, trace.span_s
    times_s = [one.at_s - zero_s for one in trace.requests]
    found = []
    for offset_s in (0.0, span_s):  # the block, and what of it lies beyond the end
        first = bisect_left(times_s, start_s - offset_s)
        last = bisect_left(times_s, start_s + length_s - offset_s)
        for index in range(first, last):
            at_s = begin_s + times_s[index] + offset_s - start_s
            found.append(replace(trace.requests[index], at_s=max(at_s, begin_s)))
    return found


def _with(trace: Trace, requests: list[TraceRequest]) -> Trace:
    return Trace(trace.name, tuple(requests))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name}: got {value}, expected a number > 0")
