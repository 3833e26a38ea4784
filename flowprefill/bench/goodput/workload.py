"""The samples that `bench goodput` serves: a trace, its objectives, scaled and resampled."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flowprefill.bench.common import check_least
from flowprefill.errors import ConfigError
from flowprefill.traces import (
    FORMATS,
    Trace,
    clipped,
    for_machine,
    load_objectives,
    objectives_for,
    prefill_only,
    read_trace,
    resampled,
    scaled_lengths,
    scaled_objectives,
    synthetic_trace,
    window,
    with_objectives,
)
from flowprefill.traces.synthetic import REQUESTS

QUICK_REQUESTS = 60
SAMPLE_S = 120.0


@dataclass(frozen=True, slots=True)
class Workload:
    """What is served.

    Attributes:
        base_rps: mean rate of the trace.
        samples: drawn from it, or itself.
        objectives_s: class -> TTFT objective, seconds.
        description: for reports.
    """

    base_rps: float
    samples: tuple[Trace, ...]
    objectives_s: dict[str, float]
    description: str


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is served."""
    group = parser.add_argument_group("workload")
    group.add_argument("--trace", type=Path, help="file; default: a synthetic one, by --seed")
    group.add_argument("--requests", type=int, default=REQUESTS, help="of the synthetic trace")
    group.add_argument("--format", default="auto", help="of the trace; auto finds it")
    group.add_argument("--start-s", type=float, default=0.0, help="skip so much of the trace")
    group.add_argument("--length-s", type=float, default=0.0, help="use so much; 0 is all")
    group.add_argument("--objectives", default="", help="map by name or JSON file")
    group.add_argument("--slo-scale", type=float, default=1.0, help="of all objectives")
    group.add_argument("--carry-slo", action="store_true",
                       help="scale TTFT objectives by the ratio of solo times")  # fmt: skip
    group.add_argument("--ttft-only", action="store_true", help="no objective per output token")
    group.add_argument("--length-scale", type=float, default=1.0, help="of prompts and outputs")
    group.add_argument("--max-tokens", type=int, default=0, help="cut longer prompts; 0 is never")
    group.add_argument("--with-decode", action="store_true", help="outputs as the trace says")
    group.add_argument("--samples", type=int, default=-1,
                       help="resamples; 0: the trace itself; default: sim 12, else 0")  # fmt: skip
    group.add_argument("--sample-s", type=float,
                       help="span of a resample; default: the trace's, 120 at most")  # fmt: skip
    group.add_argument("--block-s", type=float, default=10.0, help="of a resample's blocks")
    group.add_argument("--seed", type=int, default=1, help="of resamples, prompts and noise")


def check_workload(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags out of range."""
    for name in ("slo_scale", "length_scale", "sample_s", "block_s"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1e6:
            raise ConfigError(f"{name}: got {value}, expected a number > 0", param=name)
    for name in ("start_s", "length_s", "max_tokens"):
        check_least(name, getattr(args, name), 0)
    if args.format not in ("auto", *FORMATS):
        known = ", ".join(["auto", *FORMATS])
        raise ConfigError(f"format: got {args.format!r}, expected one of {known}", param="format")
    check_least("samples", args.samples, -1)
    check_least("requests", args.requests, 2)


def make_workload(
    args: argparse.Namespace, solo_s: Callable[[int], float], max_tokens: int
) -> Workload:
    """Read or make the trace and draw the samples.

    Args:
        solo_s: prompt tokens -> seconds of an undisturbed prefill, for ``--carry-slo``.
        max_tokens: longest prompt and output that can be served; 0 is any.
    """
    trace = _trace_of(args)
    trace = _with_objectives(args, trace, solo_s)  # before scaling: classes by the trace's lengths
    objectives_s = {one.service_class: one.ttft_s for one in trace.requests}
    trace = scaled_lengths(trace, args.length_scale)
    if not args.with_decode:
        trace = prefill_only(trace)
    if args.ttft_only:
        without = [replace(one, tpot_s=float("inf")) for one in trace.requests]
        trace = Trace(trace.name, tuple(without))
    limits = [tokens for tokens in (args.max_tokens, max_tokens) if tokens]
    if limits:
        trace = clipped(trace, min(limits))
    if trace.span_s <= 0:
        raise ConfigError(f"trace: {trace.name}: all requests arrive at once", param="trace")
    return Workload(trace.rate_rps, _samples(args, trace), objectives_s, _described(args, trace))


def _with_objectives(
    args: argparse.Namespace, trace: Trace, solo_s: Callable[[int], float]
) -> Trace:
    has_own = any(one.ttft_s < float("inf") for one in trace.requests)
    if has_own and not args.objectives and not args.carry_slo:
        return scaled_objectives(trace, args.slo_scale)
    objectives = load_objectives(args.objectives) if args.objectives else objectives_for(trace)
    if args.carry_slo:
        objectives = for_machine(objectives, solo_s, args.length_scale)
    return with_objectives(trace, objectives, args.slo_scale)


def _trace_of(args: argparse.Namespace) -> Trace:
    if args.trace is None:
        trace = synthetic_trace(args.seed, args.requests)
    else:
        trace = read_trace(args.trace, args.format, seed=args.seed)
    if args.start_s or args.length_s:
        trace = window(trace, args.start_s, args.length_s or float("inf"))
    if args.quick:
        trace = Trace(trace.name, trace.requests[:QUICK_REQUESTS])
    return trace


def _samples(args: argparse.Namespace, trace: Trace) -> tuple[Trace, ...]:
    if not args.samples:
        return (trace,)
    span_s = args.sample_s or min(trace.span_s, SAMPLE_S)
    return tuple(
        resampled(trace, args.seed + number, args.block_s, span_s) for number in range(args.samples)
    )


def _described(args: argparse.Namespace, trace: Trace) -> str:
    count = len(trace.requests)
    mean = sum(one.prompt_tokens for one in trace.requests) / count
    most = max(one.prompt_tokens for one in trace.requests)
    kind = "with decode" if args.with_decode else "prefill only"
    drawn = "itself"
    if args.samples:
        last = args.seed + args.samples - 1
        drawn = f"{args.samples} resamples (seeds {args.seed} to {last})"
    return (
        f"{trace.name}: {count} requests, {trace.rate_rps:.2f}/s, mean {mean:.0f} and at most "
        f"{most} prompt tokens, {kind}, {drawn}"
    )
