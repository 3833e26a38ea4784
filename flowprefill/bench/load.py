"""`flowprefill bench load`: requests over HTTP at a rate, with SLO attainment and goodput by class.

Each combination of policy and granularity is served by a fresh process on this machine; the client
shares its cores. With ``--url`` one server that already runs is measured as it is. All get the same
requests at the same times: a random mix, or a trace.
A request meets its SLO if the client saw its first token, and its tokens on average, in time; those
whose client went away are not counted. Goodput is how many met it, per second. Percentiles are over
the requests that had a first token under every combination: to refuse some makes none better.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowprefill.bench.arrivals import (
    MIX_CLASSES,
    Classes,
    Planned,
    random_mix,
    trace_plan,
)
from flowprefill.bench.common import add_model_arguments, check_least, say
from flowprefill.bench.http_client import (
    Outcome,
    ServerFacts,
    running_server,
    send_all,
    server_facts,
)
from flowprefill.bench.report import Report, Row, json_path, print_table
from flowprefill.bench.statistics import quantiles
from flowprefill.config import POLICIES, EngineConfig, Granularity
from flowprefill.errors import ConfigError
from flowprefill.models.checkpoint import open_checkpoint

ALL = "all"
COLUMNS = {
    "policy": "policy",
    "granularity": "granularity",
    "service_class": "class",
    "requests": "requests",
    "attainment": "SLO met %",
    "goodput_per_s": "goodput 1/s",
    "ttft_p50_s": "TTFT p50 ms",
    "ttft_p90_s": "p90 ms",
    "ttft_p99_s": "p99 ms",
    "failed": "failed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench load``."""
    add_model_arguments(parser)
    parser.add_argument("--url", help="measure this running server: http://HOST:PORT")
    parser.add_argument("--api-key", default="", help="for that server")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="several times")
    parser.add_argument("--granularity", action="append", metavar="G", help="several times")
    parser.add_argument("--requests", type=int, default=200, help="of the random mix, default 200")
    parser.add_argument("--rate", type=float, default=1.5, help="requests/s; 0 sends all at once")
    parser.add_argument("--cancelled", type=float, default=0.05, help="share of clients that leave")
    parser.add_argument("--trace", type=Path, help="file to replay instead of the mix")
    parser.add_argument("--scale", type=float, default=0.1, help="of the trace's lengths")
    parser.add_argument("--time-scale", type=float, default=1.0, help="of the trace's gaps")
    parser.add_argument("--slo-scale", type=float, default=1.0, help="of all objectives")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the report there")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    _check(args)
    facts = None if args.url is None else server_facts(args.url, args.api_key)
    if facts is not None:
        args.model, max_tokens, vocab_size = facts.model, facts.max_model_len, facts.vocab_size
    else:
        model = open_checkpoint(args.model).config
        max_tokens, vocab_size = model.max_position, model.vocab_size
    planned, unscaled = _plan(args, max_tokens)
    classes = {
        name: {key: value * args.slo_scale for key, value in objectives.items()}
        for name, objectives in unscaled.items()
    }
    names = ("model", "seed", "requests", "rate", "cancelled", "scale", "time_scale", "slo_scale")
    settings = {name: getattr(args, name) for name in names}
    trace = str(args.trace) if args.trace else None
    report = Report("load", settings | {"trace": trace, "url": args.url, "classes": classes})
    if facts is not None:
        _measure_running(args, facts, planned, classes, report)
    else:
        _measure_each(args, vocab_size, planned, classes, report)
    print_table("Requests over HTTP", report.rows, COLUMNS)
    report.write(args.json)
    return 0


def _measure_each(
    args: argparse.Namespace,
    vocab_size: int,
    planned: Sequence[Planned],
    classes: Classes,
    report: Report,
) -> None:
    """Measure every combination, each in a server of its own."""
    measured = []
    for policy in args.policy or ["slack_edf"]:
        for granularity in args.granularity or ["budget:2"]:
            say(f"{policy}, {granularity}: {len(planned)} requests in {planned[-1].at_s:.0f} s")
            config = _engine_settings(args, policy, granularity, classes)
            with running_server(args.model, config) as url:
                outcomes, elapsed_s = asyncio.run(send_all(url, planned, vocab_size, args.seed))
            combination = {"policy": policy, "granularity": granularity}
            measured.append((outcomes, elapsed_s, combination))
    answered = answered_by_all([outcomes for outcomes, _, _ in measured])
    for outcomes, elapsed_s, combination in measured:
        report.rows += rows_of(outcomes, classes, elapsed_s, combination, answered)


def _measure_running(
    args: argparse.Namespace,
    facts: ServerFacts,
    planned: Sequence[Planned],
    classes: Classes,
    report: Report,
) -> None:
    """Measure one server that runs already; it does not know our classes, so objectives are sent.

    Prompts that are too long for its model are cut.
    """
    sent = [
        dataclasses.replace(
            one,
            prompt_tokens=min(one.prompt_tokens, facts.max_model_len - one.output_tokens),
            slo=classes[one.service_class],
        )
        for one in planned
    ]
    say(f"{args.url}, {facts.model}: {len(sent)} requests in {sent[-1].at_s:.0f} s")
    outcomes, elapsed_s = asyncio.run(
        send_all(args.url, sent, facts.vocab_size, args.seed, args.api_key)
    )
    combination = {"policy": facts.policy, "granularity": facts.granularity}
    answered = answered_by_all([outcomes])
    report.rows += rows_of(outcomes, classes, elapsed_s, combination, answered)


def _check(args: argparse.Namespace) -> None:
    for text in args.granularity or ():
        Granularity.parse(text)
    check_least("threads", args.threads, 0)
    check_least("requests", args.requests, 1)
    check_least("rate", args.rate, 0)
    if not 0 <= args.cancelled < 1:
        raise ConfigError(f"cancelled: got {args.cancelled}, expected a share in [0, 1)")
    for name in ("scale", "time_scale", "slo_scale"):
        value = getattr(args, name)
        if not 0 < value <= 1000:
            raise ConfigError(f"{name}: got {value}, expected a number in (0, 1000]", param=name)
    if args.url and (args.policy or args.granularity):
        message = f"url: got {args.url!r} with --policy or --granularity, which that server has set"
        raise ConfigError(message, param="url")
    if args.quick:
        args.requests, args.rate = min(args.requests, 20), 4.0


def _plan(args: argparse.Namespace, max_tokens: int) -> tuple[list[Planned], Classes]:
    if args.trace is None:
        rng = random.Random(args.seed)
        return random_mix(rng, args.requests, args.rate, args.cancelled), MIX_CLASSES
    planned, classes = trace_plan(args.trace, args.scale, args.time_scale, max_tokens)
    return planned[:20] if args.quick else planned, classes


def _engine_settings(
    args: argparse.Namespace, policy: str, granularity: str, classes: Classes
) -> dict[str, Any]:
    settings = {
        "dtype": args.dtype, "threads": args.threads, "policy": policy, "granularity": granularity,
        "classes": classes, "prefix_cache": False,
    }  # fmt: skip
    EngineConfig.from_mapping(settings)  # refused here rather than in the server
    return settings


def answered_by_all(measured: Sequence[Sequence[Outcome]]) -> list[bool]:
    """Return of each request whether it had a first token in every one of the measurements."""
    return [
        all(one.ttft_s is not None and one.status != "cancelled" for one in ones)
        for ones in zip(*measured, strict=True)
    ]


def rows_of(
    outcomes: Sequence[Outcome],
    classes: Classes,
    elapsed_s: float,
    combination: Mapping[str, str],
    answered: Sequence[bool],
) -> list[Row]:
    """Return one row for each class that occurs, and one for all.

    Args:
        answered: of each request, whether its TTFT is one of those that are compared.
    """
    present = [n for n in classes if any(o.planned.service_class == n for o in outcomes)]
    compared = {id(o) for o, is_one in zip(outcomes, answered, strict=True) if is_one}
    rows: list[Row] = []
    for name in (*present, ALL):
        of_class = [o for o in outcomes if name in (ALL, o.planned.service_class)]
        counted = [o for o in of_class if o.status != "cancelled"]
        met = sum(o.meets(classes[o.planned.service_class]) for o in counted)
        ttfts = [o.ttft_s for o in counted if id(o) in compared and o.ttft_s is not None]
        wrong = Counter(o.status for o in counted if o.status != "ok")
        rows.append(
            {
                **combination,
                "service_class": name,
                "requests": len(counted),
                "cancelled": len(of_class) - len(counted),
                "failed": wrong.total(),
                "failures": dict(wrong),
                "attainment": met / len(counted) if counted else None,
                "goodput_per_s": met / elapsed_s,
                **quantiles("ttft", ttfts, (0.5, 0.9, 0.99)),
                "compared": len(ttfts),
                "prompt_tokens": sum(o.planned.prompt_tokens for o in counted),
                "elapsed_s": elapsed_s,
            }
        )
    return rows
