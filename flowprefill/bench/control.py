"""`flowprefill bench control`: how fast the control plane is while all cores compute.

A long prompt is prefilled on all cores. A thread submits short prompts to it, one at a time, after
random pauses, as a server's thread would. Measured from just before `Engine.submit`, with token ids
(no tokenising):

- `dispatch`: until the run lies in the executor's mailbox. That is `submit` itself: checks, KV
  blocks, the decision, building the run's program;
- `seen`: until the long prompt's last segment before the newcomer ends: there the executor has seen
  the flag, which is raised once the decision is made. This holds the rest of the segment that was
  executing, so it is measured with segments of 0.2 ms as well, where little of it is waiting;
- `start`: until the first segment of the newcomer starts;
- `submit`: until `submit` returns to the caller.
"""

from __future__ import annotations

import argparse
import random
import time
from contextlib import suppress
from dataclasses import dataclass, field

from flowprefill.bench.common import (
    FIRST_TOKEN_ONLY,
    add_common_arguments,
    check_common,
    check_least,
    check_lengths,
    first_token_s,
    load_engine,
    random_ids,
    say,
)
from flowprefill.bench.mixed_round import last_segments
from flowprefill.bench.report import Report, Row, print_table
from flowprefill.bench.statistics import median, quantiles
from flowprefill.config import Granularity
from flowprefill.engine import Engine
from flowprefill.engine.records import RequestRecord
from flowprefill.errors import RequestCancelled
from flowprefill.request import SLO, Request

GRANULARITIES = ("budget:2", "budget:0.2")
PAUSES_S = (0.002, 0.03)  # between an answer and the next submit
FEASIBLE = 4.0  # the short prompts' objective, in units of their time alone
SHARES = (0.5, 0.99, 1)
COLUMNS = {
    "granularity": "granularity",
    "submit_to_dispatch_p50_s": "to dispatch p50 ms",
    "submit_to_dispatch_p99_s": "p99 ms",
    "submit_to_seen_p50_s": "to seen p50 ms",
    "submit_to_seen_p99_s": "p99 ms ",
    "submit_to_start_p50_s": "to start p50 ms",
    "submit_to_start_p99_s": "p99 ms   ",
    "submit_call_p50_s": "submit() p50 ms",
    "submit_call_p99_s": "p99 ms  ",
    "decision_p50_s": "decision p50 ms",
    "segment_p50_s": "segment p50 ms",
    "samples": "samples",
}


@dataclass
class Samples:
    """An observer of the engine; keeps the times of the short prompts, seconds."""

    to_dispatch_s: list[float] = field(default_factory=list)
    to_seen_s: list[float] = field(default_factory=list)
    to_start_s: list[float] = field(default_factory=list)
    call_s: list[float] = field(default_factory=list)
    decision_s: list[float] = field(default_factory=list)
    segment_s: list[float] = field(default_factory=list)
    is_counting: bool = False

    def on_end(self, record: RequestRecord) -> None:
        """Take a short prompt's times."""
        if self.is_counting and record.slo.service_class == "short":
            blocking_s = record.blocking_s or 0.0
            self.to_start_s.append(record.timings.queue)
            self.to_dispatch_s.append(record.timings.queue - blocking_s)

    def on_preemption(self, reason: str, ack_s: float) -> None:
        """Not needed: `on_end` tells it with the request."""

    def on_decision(self, seconds: float) -> None:
        """Take what the scheduler's share was."""
        if self.is_counting:
            self.decision_s.append(seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench control``."""
    add_common_arguments(parser, rounds=3)
    parser.add_argument(
        "--granularity",
        action="append",
        metavar="G",
        help=f"may be given several times; default {', '.join(GRANULARITIES)}",
    )
    parser.add_argument("--long-tokens", type=int, default=7500, help="default 7500")
    parser.add_argument("--short-tokens", type=int, default=16, help="default 16")
    parser.add_argument("--shorts", type=int, default=100, help="submits per round, default 100")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    granularities = list(dict.fromkeys(args.granularity or GRANULARITIES))
    for text in granularities:
        Granularity.parse(text)
    check_common(args)
    check_least("shorts", args.shorts, 1)
    if args.quick:
        args.rounds, args.shorts = 1, min(args.shorts, 8)
        args.long_tokens = min(args.long_tokens, 1500)
    names = ("model", "rounds", "seed", "long_tokens", "short_tokens", "shorts")
    report = Report("control", {name: getattr(args, name) for name in names})
    found = {name: Samples() for name in granularities}
    with load_engine(args) as engine:
        check_lengths(engine, [args.long_tokens, args.short_tokens])
        report.settings["engine"] = engine.describe()
        for samples in found.values():
            engine.subscribe(samples)
        for number in range(args.rounds):
            for name in granularities:
                say(f"round {number + 1}/{args.rounds}  {name}")
                measure(engine, name, args, random.Random(args.seed + number), found[name])
    report.rows = [row_of(name, samples) for name, samples in found.items()]
    print_table("From submit() to the executor, all cores computing", report.rows, COLUMNS)
    report.write(args.json)
    return 0


def measure(
    engine: Engine, granularity: str, args: argparse.Namespace, rng: random.Random, into: Samples
) -> None:
    """Prefill one long prompt and submit short ones meanwhile, until enough or it has ended."""
    engine.set_granularity(granularity)
    short = [random_ids(rng, args.short_tokens, engine.vocab_size) for _ in range(args.shorts)]
    alone_s = median([first_token_s(engine, ids) for ids in short[:5]][1:])
    slo = SLO(ttft=FEASIBLE * alone_s, service_class="short")
    long_ids = random_ids(rng, args.long_tokens, engine.vocab_size)
    long = engine.submit(Request(long_ids, FIRST_TOKEN_ONLY), SLO(ttft=600.0))
    start_s = time.monotonic()
    into.is_counting = True
    calls_s = []
    for ids in short:
        request = Request(ids, FIRST_TOKEN_ONLY)
        time.sleep(rng.uniform(*PAUSES_S))
        if long.done:
            break
        called_s = time.monotonic()
        calls_s.append(called_s)
        handle = engine.submit(request, slo)
        into.call_s.append(time.monotonic() - called_s)
        handle.result(600)
    into.is_counting = False
    long.cancel()
    with suppress(RequestCancelled):
        long.result(600)
    segments = [entry for entry in engine.timeline() if entry.start_s >= start_s]
    into.segment_s += [entry.end_s - entry.start_s for entry in segments]
    last = last_segments(calls_s, segments, f"prefill {long.request_id}")
    into.to_seen_s += [segments[index].end_s - called_s for called_s, index in last]


def row_of(granularity: str, samples: Samples) -> Row:
    """Return the row of one granularity."""
    return {
        "granularity": granularity,
        **quantiles("submit_to_dispatch", samples.to_dispatch_s, SHARES),
        **quantiles("submit_to_seen", samples.to_seen_s, SHARES),
        **quantiles("submit_to_start", samples.to_start_s, SHARES),
        **quantiles("submit_call", samples.call_s, SHARES),
        **quantiles("decision", samples.decision_s, SHARES),
        **quantiles("segment", samples.segment_s, SHARES),
        "samples": len(samples.to_seen_s),
    }
