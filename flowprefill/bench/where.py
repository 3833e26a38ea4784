"""`flowprefill bench where`: where a prefill's time goes, by operator, against the machine's peak.

A prompt is prefilled with one segment per operator, light operators riding with the product or
attention behind which they stand; the executor's timeline tells how long each took. Next to them:
the rate of a large matrix product through torch, measured in the same run, as the peak.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from flowprefill.bench.common import (
    add_common_arguments,
    add_lengths,
    check_common,
    check_lengths,
    first_token_s,
    load_engine,
    random_ids,
)
from flowprefill.bench.prefill import gemm_flops_per_s
from flowprefill.bench.report import Report, Row, print_table
from flowprefill.bench.statistics import median
from flowprefill.engine import Engine
from flowprefill.engine.records import TimelineEntry
from flowprefill.models.families import build_graph
from flowprefill.models.graph import ModelGraph
from flowprefill.scheduling.cost_model import attention_pairs

LENGTHS = (512, 2048, 7500)
QUICK_LENGTHS = (64,)
COLUMNS = {
    "tokens": "tokens",
    "operators": "operators",
    "seconds": "ms",
    "share": "share %",
    "gflops": "GFLOP/s",
    "of_peak": "of peak %",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench where``."""
    add_common_arguments(parser, rounds=3)
    add_lengths(parser, LENGTHS)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    check_common(args)
    lengths = args.tokens or list(QUICK_LENGTHS if args.quick else LENGTHS)
    rounds = 1 if args.quick else args.rounds
    settings = {"model": args.model, "rounds": rounds, "seed": args.seed, "tokens": lengths}
    report = Report("where", settings)
    with load_engine(args, granularity="operator") as engine:
        check_lengths(engine, lengths)
        report.settings["engine"] = engine.describe()
        graph = build_graph(engine.model_config)
        rng = random.Random(args.seed)
        first_token_s(engine, random_ids(rng, min(lengths), engine.vocab_size))
        peak = max(gemm_flops_per_s(engine.dtype, engine.threads) for _ in range(rounds))
        report.extra["gemm_flops_per_s"] = peak
        for tokens in lengths:
            runs = [_segments_of_one(engine, rng, tokens) for _ in range(rounds)]
            report.rows += rows_of(graph, tokens, runs, peak)
    print_table(
        f"Where the time goes, {engine.dtype}, {engine.threads} threads", report.rows, COLUMNS
    )
    report.write(args.json)
    return 0


def _segments_of_one(engine: Engine, rng: random.Random, tokens: int) -> list[TimelineEntry]:
    """Prefill one prompt; returns its segments in order."""
    before = engine.stats().segments
    first_token_s(engine, random_ids(rng, tokens, engine.vocab_size))
    return engine.timeline(before)


def rows_of(
    graph: ModelGraph, tokens: int, runs: Sequence[Sequence[TimelineEntry]], peak: float
) -> list[Row]:
    """Return one row for each group of operators, the sum over all layers, medians over runs."""
    seconds: dict[str, list[float]] = {}
    for segments in runs:
        total: dict[str, float] = {}
        for entry in segments:
            name = entry.segment.split()[0]
            total[name] = total.get(name, 0.0) + entry.end_s - entry.start_s
        for name, one in total.items():
            seconds.setdefault(name, []).append(one)
    whole = sum(median(taken) for taken in seconds.values())
    flops = flops_of_groups(graph, list(seconds), tokens)
    return [
        {
            "tokens": tokens,
            "operators": group,
            "seconds": median(seconds[first]),
            "share": median(seconds[first]) / whole,
            "gflops": work / median(seconds[first]) / 1e9,
            "of_peak": work / median(seconds[first]) / peak,
        }
        for first, (group, work) in flops.items()
    ]


def flops_of_groups(
    graph: ModelGraph, firsts: Sequence[str], tokens: int
) -> dict[str, tuple[str, float]]:
    """Return what each segment computes, by its first operator's name.

    Args:
        firsts: names of the operators that begin a segment.

    Returns:
        The heavy operators of the segment, and their operations over all layers: 2 for each weight
        and row, 4 times the columns of the queries for each (token, visible token) pair.
    """
    elements = {operator.name: 0 for operator in graph.operators}
    for operator, count in graph.products():
        elements[operator.name] += count
    per_pair = 4.0 * graph.num_heads * graph.head_dim
    groups: dict[str, tuple[list[str], float]] = {}
    first = ""
    for operator in graph.operators:
        if operator.name in firsts:
            first = operator.name
        names, flops = groups.setdefault(first, ([], 0.0))
        if operator.kind == "linear":
            rows = tokens if operator.layer >= 0 else 1
            work = 2.0 * rows * elements.pop(operator.name, 0)
        elif operator.kind == "attention":
            keys = min(operator.window or tokens, tokens)
            work = per_pair * (attention_pairs(tokens, 0) - attention_pairs(tokens - keys, 0))
        else:
            continue
        if operator.name not in names:
            names.append(operator.name)
        groups[first] = (names, flops + work)
    return {name: (", ".join(ops) or name, work) for name, (ops, work) in groups.items() if name}
