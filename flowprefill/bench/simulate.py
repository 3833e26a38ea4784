"""`flowprefill simulate`: a trace on one worker or a cluster of them, in virtual time.

The scheduler and the planner are the engine's own; a profile says how fast which model is on which
machine. Each combination of policy, granularity, rate and router gets the same requests with the
same noise. `--against-engine` plays the trace on an engine on this machine too: simulate_check.py.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flowprefill.bench import ablation, simulate_check
from flowprefill.bench.common import check_least, say
from flowprefill.bench.report import Report, Row, json_path, print_table
from flowprefill.config import POLICIES, Granularity
from flowprefill.errors import ConfigError
from flowprefill.scheduling import SchedulerSettings
from flowprefill.simulation import (
    ClusterResult,
    Configuration,
    Profile,
    Result,
    WorkCosts,
    simulate,
    simulate_cluster,
)
from flowprefill.simulation.node import ROLES
from flowprefill.simulation.routers import ROUTERS, check_router
from flowprefill.traces import (
    Trace,
    at_rate,
    load_objectives,
    objectives_for,
    read_trace,
    resampled,
    scaled_lengths,
    synthetic_trace,
    with_objectives,
)

if TYPE_CHECKING:
    from flowprefill.simulation.cluster import ClassCounts

ALL = "all"
SETTINGS = (
    "requests", "length_scale", "slo_scale", "role", "workers", "seed", "noise", "bias", "ablate",
)  # fmt: skip
DEFAULT_PROFILE = "llama-3.1-8b@a800"
SOURCE_COLUMNS = {"name": "name", "source": "where its figures come from"}
COLUMNS = {
    "configuration": "configuration",
    "router": "router",
    "rate_rps": "req/s",
    "service_class": "class",
    "requests": "requests",
    "attainment": "SLO met %",
    "ttft_p50_s": "TTFT p50 ms",
    "ttft_p90_s": "p90 ms",
    "ttft_p99_s": "p99 ms",
    "preemptions": "preempt.",
    "blocking_p99_s": "block ms",
    "utilisation": "busy %",
    "simulated_per_s": "simulated/s",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill simulate``."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--trace", type=Path, metavar="FILE", help="a trace of any known format")
    source.add_argument(
        "--synthetic", action="store_true", help="a seeded trace like a chat service's (default)"
    )
    parser.add_argument("--requests", type=int, default=2000, help="of the synthetic trace")
    parser.add_argument(
        "--rate", type=float, action="append", metavar="R",
        help="requests/s, gaps scaled alike; several times; default: the trace's own",
    )  # fmt: skip
    parser.add_argument("--length-scale", type=float, default=1.0, help="of the trace's lengths")
    parser.add_argument("--objectives", help="name or file; default: by what the trace has")
    parser.add_argument("--slo-scale", type=float, default=1.0, help="of all objectives")
    parser.add_argument("--profile", default=DEFAULT_PROFILE, help="MODEL@MACHINE, cpu or a file")
    parser.add_argument("--profiles", action="store_true", help="list the profiles and leave")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="several times")
    parser.add_argument("--granularity", action="append", metavar="G", help="several times")
    parser.add_argument("--batch-tokens", type=int, default=0, help="packed in one prefill at most")
    parser.add_argument("--role", default="prefill", choices=ROLES, help="what the workers do")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--router", action="append", choices=ROUTERS, help="several times")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0.0, help="sigma of log(true / predicted)")
    parser.add_argument("--bias", type=float, default=1.0, help="predictions are times this")
    parser.add_argument(
        "--ablate", type=int, default=0, metavar="N",
        help="slack_edf on N resamples, with each of its constants and rules changed alone",
    )  # fmt: skip
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the report there")
    simulate_check.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Simulate, print the table, write the JSON."""
    if args.profiles:
        for kind in ("model", "machine"):
            rows = [{"name": name, "source": text} for name, text in Profile.sources(kind).items()]
            print_table(f"{kind.upper()} of --profile MODEL@MACHINE", rows, SOURCE_COLUMNS)
        return 0
    configurations = _configurations(args)
    trace = read_requests(args)
    if args.against_engine:
        return simulate_check.run(args, trace, configurations)
    rates = args.rate or [trace.rate_rps]
    routers = args.router or ["two_choices" if args.workers > 1 else "round_robin"]
    for router in routers:
        check_router(router, args.role)
    profile = simulate_check.cpu_profile(args) if args.profile == "cpu" else None
    profile = profile or Profile.load(args.profile)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"trace": trace.name, "profile": profile.name, "source": profile.source}
    report = Report("simulate", settings)
    if args.ablate:
        return _ablate(args, at_rate(trace, rates[0]), configurations[0], profile, report)
    for rate, configuration, router in itertools.product(rates, configurations, routers):
        say(f"{configuration.name}, {rate:.3g} requests/s, {router}")
        report.rows += _rows(args, at_rate(trace, rate), configuration, profile, router)
    several = {"router": len(routers) > 1, "rate_rps": len(rates) > 1}
    columns = {key: name for key, name in COLUMNS.items() if several.get(key, True)}
    single = "" if len(rates) > 1 else f", {rates[0]:.3g} requests/s"
    workers = f"{args.workers} workers" if args.workers > 1 else "one worker"
    title = f"{trace.name}{single}, {profile.name}, {workers}, {args.role}"
    print_table(title, report.rows, columns)
    report.write(args.json)
    return 0


def _ablate(
    args: argparse.Namespace,
    trace: Trace,
    configuration: Configuration,
    profile: Profile,
    report: Report,
) -> int:
    check_least("ablate", args.ablate, 2)
    costs = WorkCosts(profile, configuration.granularity)

    def serve(sample: Trace, changed: Configuration) -> Result:
        return simulate(
            sample.requests, changed, profile,
            seed=args.seed, noise=args.noise, bias=args.bias, role=args.role, costs=costs,
        )  # fmt: skip

    samples = [resampled(trace, args.seed + number) for number in range(args.ablate)]
    decodes = args.role != "prefill"
    report.rows += ablation.rows(samples, configuration, serve, decodes=decodes)
    rate = f"{trace.rate_rps:.3g} requests/s"
    title = f"{trace.name}, {args.ablate} resamples, {rate}, {profile.name}, {args.role}"
    print_table(title, report.rows, ablation.COLUMNS)
    report.write(args.json)
    return 0


def read_requests(args: argparse.Namespace) -> Trace:
    """Return the trace that the flags name, lengths scaled, with objectives."""
    check_least("requests", args.requests, 2)
    check_least("batch_tokens", args.batch_tokens, 0)
    if args.trace is None:
        trace = synthetic_trace(args.seed, args.requests)
    else:
        trace = read_trace(args.trace, seed=args.seed)
    objectives = load_objectives(args.objectives) if args.objectives else objectives_for(trace)
    trace = with_objectives(trace, objectives, args.slo_scale)
    return scaled_lengths(trace, args.length_scale) if args.length_scale != 1.0 else trace


def _configurations(args: argparse.Namespace) -> list[Configuration]:
    granularities = [Granularity.parse(text) for text in args.granularity or ["budget:2"]]
    for rate in args.rate or ():
        if not 0 < rate < float("inf"):
            raise ConfigError(f"rate: got {rate}, expected a number > 0", param="rate")
    found = []
    for policy, cut in itertools.product(args.policy or ["slack_edf"], granularities):
        settings = SchedulerSettings(max_blocking_s=cut.max_blocking_s)
        if args.batch_tokens:
            settings.max_batch_tokens = args.batch_tokens
        found.append(Configuration(policy, cut, settings))
    return found


def _rows(
    args: argparse.Namespace,
    trace: Trace,
    configuration: Configuration,
    profile: Profile,
    router: str,
) -> Iterator[Row]:
    """Simulate one combination; yield a row of each class and one of all."""
    start_s = time.perf_counter()
    result = simulate_cluster(
        trace.requests, args.workers, router, configuration, profile,
        seed=args.seed, noise=args.noise, bias=args.bias, role=args.role,
    )  # fmt: skip
    took_s = time.perf_counter() - start_s
    common: Row = {
        "configuration": configuration.name,
        "policy": configuration.policy,
        "granularity": str(configuration.granularity),
        "router": router,
        "rate_rps": trace.rate_rps,
    }
    if len(result.classes) > 1:
        for name in sorted(result.classes):
            yield common | _counts(name, result.classes[name])
    yield common | _counts(ALL, result.whole) | _whole(result, took_s)


def _counts(name: str, counts: ClassCounts) -> Row:
    quantiles = {f"ttft_p{q}_s": counts.ttft.quantile(q / 100) for q in (50, 90, 99)}
    return {
        "service_class": name,
        "requests": counts.requests,
        "attainment": counts.attainment,
        **quantiles,
    }


def _whole(result: ClusterResult, took_s: float) -> Row:
    return {
        "preemptions": result.preemptions,
        "blocking_p50_s": result.blocking.quantile(0.5),
        "blocking_p99_s": result.blocking.quantile(0.99),
        "blocking_max_s": result.blocking.max,
        "utilisation": result.utilisation,
        "events": result.events,
        "simulated_per_s": result.whole.requests / took_s,
    }
