"""`flowprefill simulate --against-engine`: the same trace on an engine here and in the simulator.

The engine's profile is its calibration, fitted to prompts that have the machine alone before the
traces are played; how much those times vary is the simulation's noise. Prefill only: each request
ends with its first token. Arrivals are in real time, so a rate takes the span of its trace.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowprefill.bench.common import (
    FIRST_TOKEN_ONLY,
    add_engine_arguments,
    check_lengths,
    first_token_s,
    load_engine,
    random_ids,
    say,
)
from flowprefill.bench.report import Report, Row, print_table
from flowprefill.errors import FlowPrefillError
from flowprefill.request import SLO, Request
from flowprefill.simulation import Configuration, Profile, simulate
from flowprefill.simulation.measured import fitted, profile_of
from flowprefill.simulation.result import quantile
from flowprefill.traces import Trace, at_rate

if TYPE_CHECKING:
    from flowprefill.engine import Engine
    from flowprefill.engine.handle import Handle

RATE_SCALES = (1.0, 1.5, 2.0)  # of the trace's own rate, where --rate names none
ROUNDS = 5  # how often each length has the machine alone
LENGTHS = 5  # of them, from the trace's shortest to its longest
PATIENCE_S = 600.0
COLUMNS = {
    "configuration": "configuration",
    "rate_rps": "req/s",
    "requests": "requests",
    "engine_attainment": "engine: SLO met %",
    "attainment": "simulator %",
    "difference": "difference, points",
    "engine_ttft_p50_s": "engine: TTFT p50 ms",
    "ttft_p50_s": "simulator ms",
    "ttft_error": "median error %",
    "utilisation": "busy %",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the engine."""
    parser.add_argument(
        "--against-engine", action="store_true", help="play the trace on an engine here, too"
    )
    add_engine_arguments(parser, "of that engine, and of cpu")


def cpu_profile(args: argparse.Namespace) -> Profile:
    """Return the profile of the model that the flags name on this machine."""
    with load_engine(args, device="cpu") as engine:
        return profile_of(engine)


def run(args: argparse.Namespace, trace: Trace, configurations: Sequence[Configuration]) -> int:
    """Measure and simulate each configuration at each rate; print, write the JSON."""
    rates = args.rate or [trace.rate_rps * scale for scale in RATE_SCALES]
    names = ("model", "seed", "length_scale", "slo_scale")
    settings = {name: getattr(args, name) for name in names}
    report = Report("simulate --against-engine", settings | {"trace": trace.name})
    for configuration in configurations:
        cut, policy = str(configuration.granularity), configuration.policy
        chosen: dict[str, Any] = {"device": "cpu", "granularity": cut, "policy": policy}
        if args.batch_tokens:
            chosen["max_batch_tokens"] = args.batch_tokens
        with load_engine(args, **chosen) as engine:
            check_lengths(engine, [request.prompt_tokens for request in trace.requests])
            report.settings["engine"] = engine.describe()
            alone = measure_alone(engine, trace, random.Random(args.seed))
            profile = fitted(profile_of(engine), configuration.granularity, alone)
            noise = spread_of(alone)
            report.extra.setdefault("profiles", []).append(
                {"name": configuration.name, "rates": str(profile.rates), "noise": noise}
            )
            say(f"alone: {profile.rates}, noise {noise:.3f}")
            for rate in rates:
                scaled = at_rate(trace, rate)
                say(f"{configuration.name}, {rate:.3g} requests/s, {scaled.span_s:.0f} s")
                ttfts = play(engine, scaled, random.Random(args.seed))
                result = simulate(
                    scaled.requests, configuration, profile, seed=args.seed, noise=noise
                )
                simulated = [outcome.ttft_s for outcome in result.outcomes]
                report.rows.append(
                    row_of(configuration.name, scaled, ttfts, simulated)
                    | {"utilisation": result.utilisation}
                )
    print_table("The engine on this machine, and the simulator", report.rows, COLUMNS)
    report.write(args.json)
    return 0


def measure_alone(engine: Engine, trace: Trace, rng: random.Random) -> list[tuple[int, float]]:
    """Measure prompts of some lengths that have the machine alone, in turn: (tokens, seconds)."""
    shortest = min(request.prompt_tokens for request in trace.requests)
    longest = max(request.prompt_tokens for request in trace.requests)
    ratio = (longest / shortest) ** (1 / (LENGTHS - 1))
    lengths = sorted({round(shortest * ratio**step) for step in range(LENGTHS)} | {longest})
    first_token_s(engine, random_ids(rng, min(256, longest), engine.vocab_size))
    return [
        (tokens, first_token_s(engine, random_ids(rng, tokens, engine.vocab_size)))
        for _ in range(ROUNDS)
        for tokens in lengths
    ]


def spread_of(measured: Sequence[tuple[int, float]]) -> float:
    """Return the standard deviation of the logarithm of times of one length."""
    by_length: dict[int, list[float]] = {}
    for tokens, seconds in measured:
        by_length.setdefault(tokens, []).append(math.log(seconds))
    squares, degrees = 0.0, 0
    for logs in by_length.values():
        mean = sum(logs) / len(logs)
        squares += sum((one - mean) ** 2 for one in logs)
        degrees += len(logs) - 1
    return math.sqrt(squares / degrees) if degrees else 0.0


def play(engine: Engine, trace: Trace, rng: random.Random) -> list[float]:
    """Submit the trace's requests in real time; returns times to first token, inf of the failed."""
    prompts = [random_ids(rng, one.prompt_tokens, engine.vocab_size) for one in trace.requests]
    handles: list[Handle | None] = []
    start_s = time.monotonic() + 0.1
    for request, ids in zip(trace.requests, prompts, strict=True):
        time.sleep(max(start_s + request.at_s - time.monotonic(), 0.0))
        slo = SLO(ttft=request.ttft_s if request.ttft_s < math.inf else None)
        try:
            handles.append(engine.submit(Request(ids, FIRST_TOKEN_ONLY), slo))
        except FlowPrefillError:
            handles.append(None)
    ttfts = []
    for handle in handles:
        try:
            ttft = handle.result(PATIENCE_S).timings.ttft if handle is not None else None
        except FlowPrefillError:
            ttft = None
        ttfts.append(math.inf if ttft is None else ttft)
    return ttfts


def row_of(name: str, trace: Trace, measured: Sequence[float], simulated: Sequence[float]) -> Row:
    """Compare times to first token, request by request."""
    requests = trace.requests

    def attainment(ttfts: Sequence[float]) -> float:
        on_time = [ttft <= one.ttft_s for ttft, one in zip(ttfts, requests, strict=True)]
        return sum(on_time) / len(on_time)

    errors = [
        abs(ours - theirs) / theirs
        for ours, theirs in zip(simulated, measured, strict=True)
        if theirs < math.inf
    ]
    engine, simulator = attainment(measured), attainment(simulated)
    return {
        "configuration": name,
        "rate_rps": trace.rate_rps,
        "requests": len(requests),
        "engine_attainment": engine,
        "attainment": simulator,
        "difference": (simulator - engine) * 100,
        "engine_ttft_p50_s": quantile(measured, 0.5),
        "ttft_p50_s": quantile(simulated, 0.5),
        "ttft_error": quantile(errors, 0.5),
    }
