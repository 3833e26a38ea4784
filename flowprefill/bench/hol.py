"""`flowprefill bench hol`: head-of-line blocking, short prompts during a long one by granularity.

In every round each granularity gets the same random prompts and arrival times (mixed_round.py), in
an order that changes from round to round; the rows hold medians over rounds and percentiles over
the short prompts, of each round those that all granularities were sent.

`prefill_tokens_per_s`: all prompt tokens, long and short, over the time from the long prompt's
submit to the last first token of all. The device has work all that time, and the same work for each
granularity (less where the long prompt ended before all short ones were sent), so what it loses to
preemption and to cutting shows as a lower rate.
`throughput_vs_none` is the median over rounds of its ratio to the same round's `none`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from flowprefill.bench.common import (
    add_common_arguments,
    check_common,
    check_least,
    check_lengths,
    first_token_s,
    load_engine,
    random_ids,
    say,
)
from flowprefill.bench.mixed_round import Round, Workload, measure_round
from flowprefill.bench.report import Report, Row, print_table
from flowprefill.bench.statistics import median, percentile, quantiles
from flowprefill.config import Granularity
from flowprefill.engine import Engine
from flowprefill.request import SLO

GRANULARITIES = ("none", "layer", "operator", "chunk:512", "budget:2")
QUICK_LONG_TOKENS, QUICK_SHORTS = 1000, 4
SPAN = 0.85  # of the long prompt's time alone, within which the short ones arrive
FEASIBLE = 4.0  # a short prompt's objective, in units of its time alone
COLUMNS = {
    "granularity": "granularity",
    "short_alone_p50_s": "short alone p50 ms",
    "short_beside_p50_s": "during the long one p50 ms",
    "short_beside_p99_s": "p99 ms",
    "long_alone_s": "long alone s",
    "long_beside_s": "long with shorts s",
    "blocking_p50_s": "blocking p50 ms",
    "blocking_p99_s": "p99 ms ",
    "blocking_max_s": "max ms",
    "prefill_tokens_per_s": "prefill tokens/s",
    "throughput_vs_none": "of none %",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench hol``."""
    add_common_arguments(parser, rounds=3)
    parser.add_argument(
        "--granularity", action="append", metavar="G",
        help=f"may be given several times; default {', '.join(GRANULARITIES)}",
    )  # fmt: skip
    parser.add_argument("--long-tokens", type=int, default=7500, help="default 7500")
    parser.add_argument("--short-tokens", type=int, default=64, help="default 64")
    parser.add_argument(
        "--shorts", type=int, default=40, help="short prompts per round, default 40"
    )
    parser.add_argument(
        "--short-ttft-ms", type=float, default=0.0,
        help=f"objective of the short prompts; 0 is {FEASIBLE:g} times their time alone",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    granularities = list(dict.fromkeys(args.granularity or GRANULARITIES))
    for text in granularities:
        Granularity.parse(text)
    check_common(args)
    check_least("shorts", args.shorts, 1)
    check_least("short-ttft-ms", args.short_ttft_ms, 0)
    if args.quick:
        args.rounds, args.shorts = 1, min(args.shorts, QUICK_SHORTS)
        args.long_tokens = min(args.long_tokens, QUICK_LONG_TOKENS)
    report = Report("hol", _settings(args, granularities))
    with load_engine(args) as engine:
        check_lengths(engine, [args.long_tokens, args.short_tokens])
        report.settings["engine"] = engine.describe()
        rounds = measure(engine, args, granularities)
    report.rows = [row_of(name, rounds) for name in granularities]
    print_table(f"Short prompts during one of {args.long_tokens:,} tokens", report.rows, COLUMNS)
    report.write(args.json)
    return 0


def _settings(args: argparse.Namespace, granularities: list[str]) -> Row:
    names = ("model", "rounds", "seed", "long_tokens", "short_tokens", "shorts", "short_ttft_ms")
    return {name: getattr(args, name) for name in names} | {"granularities": granularities}


def measure(
    engine: Engine, args: argparse.Namespace, granularities: Sequence[str]
) -> list[list[Round]]:
    """Return the rounds, each one `Round` for every granularity."""
    workload, span_s = prepare(engine, args)
    rounds = []
    for number in range(args.rounds):
        shift = number % len(granularities)
        found = []
        for name in (*granularities[shift:], *granularities[:shift]):
            found.append(measure_round(engine, name, workload, span_s, args.seed + number))
            rate = found[-1].tokens / found[-1].elapsed_s
            say(f"round {number + 1}/{args.rounds}  {name:<10} {rate:6.0f} tokens/s")
        rounds.append(found)
        span_s = SPAN * median(one.long_alone_s for one in found)  # the machine's speed may drift
    return rounds


def prepare(engine: Engine, args: argparse.Namespace) -> tuple[Workload, float]:
    """Warm up; find an objective the short prompts can meet and how long the long one takes."""
    rng = random.Random(args.seed)
    warm = min(512, args.long_tokens)
    first_token_s(engine, random_ids(rng, warm, engine.vocab_size))
    short = [random_ids(rng, args.short_tokens, engine.vocab_size) for _ in range(6)]
    alone_s = median([first_token_s(engine, ids) for ids in short][1:])
    long_s = first_token_s(engine, random_ids(rng, args.long_tokens, engine.vocab_size))
    ttft_s = args.short_ttft_ms / 1e3 or FEASIBLE * alone_s
    slo = SLO(ttft=ttft_s, service_class="short")
    return Workload(args.long_tokens, args.short_tokens, args.shorts, slo), SPAN * long_s


def row_of(name: str, rounds: Sequence[Sequence[Round]]) -> Row:
    """Return the row of one granularity."""
    counted = [
        (one, min(len(other.shorts) for other in found))
        for found in rounds
        for one in found
        if one.granularity == name
    ]
    mine = [one for one, _ in counted]
    during = [short.ttft_s for one, count in counted for short in one.shorts[:count]]
    blocking = [seconds for one, count in counted for seconds in one.blocking_s(count)]
    return {
        "granularity": name,
        "short_alone_p50_s": median(s for one in mine for s in one.short_alone_s),
        "short_beside_p50_s": median(during),
        "short_beside_p99_s": percentile(during, 0.99),
        "long_alone_s": median(one.long_alone_s for one in mine),
        "long_beside_s": median(one.long.ttft_s for one in mine),
        **quantiles("blocking", blocking, (0.5, 0.99, 1)),
        "prefill_tokens_per_s": median(one.tokens / one.elapsed_s for one in mine),
        "throughput_vs_none": _versus_none(name, rounds),
        "shorts": len(during),
        "blocked": len(blocking),
    }


def _versus_none(name: str, rounds: Sequence[Sequence[Round]]) -> float | None:
    ratios = []
    for found in rounds:
        rates = {one.granularity: one.tokens / one.elapsed_s for one in found}
        if "none" in rates:
            ratios.append(rates[name] / rates["none"])
    return median(ratios) if ratios else None
