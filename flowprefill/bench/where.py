"""`flowprefill bench where`: where the time of prefill and decode goes, against the ceilings.

A prompt is prefilled with one segment per operator, light operators riding with the product or
attention behind which they stand; the executor's timeline tells how long each took. Next to them:
the peak of the processor's instruction, measured in the same run (`flowprefill doctor`). The same
for decode steps, by the bytes of weights and keys that each operator reads, against the rate at
which our kernels read DRAM (`flowprefill doctor`).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flowprefill.bench.common import (
    add_common_arguments,
    add_lengths,
    check_common,
    check_least,
    check_lengths,
    first_token_s,
    load_engine,
    measure_ceilings,
    random_ids,
)
from flowprefill.bench.report import Report, Row, print_table
from flowprefill.bench.statistics import median
from flowprefill.engine import Engine
from flowprefill.engine.records import TimelineEntry
from flowprefill.models.families import build_graph
from flowprefill.models.graph import PRODUCTS, ModelGraph, Operator
from flowprefill.request import Request, SamplingParams
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
DECODE_COLUMNS = {
    "sequences": "sequences",
    "operators": "operators",
    "seconds": "ms",
    "share": "share %",
    "gb_per_s": "GB/s",
    "of_read": "of DRAM %",
}
BATCHES = (1, 16)
DECODE_CONTEXT = 64  # tokens of each sequence when its decoding begins
DECODE_STEPS = 24
QUICK_DECODE_STEPS = 3
MOST_DECODE_STEPS = 400  # the executor's timeline holds them


class ElementBytes(NamedTuple):
    """Bytes of one weight of a product, on average, and of one element of the cache."""

    weight: float
    cache: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench where``."""
    add_common_arguments(parser, rounds=3)
    add_lengths(parser, LENGTHS)
    parser.add_argument(
        "--decode", type=int, nargs="*", metavar="N", default=BATCHES,
        help="sequences of a decode step, default 1 16; nothing after it: only prefill",
    )  # fmt: skip


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
        ceilings = [measure_ceilings(engine) for _ in range(rounds)]
        peak = max(measured.flops_per_s for measured in ceilings)
        report.extra["peak_flops_per_s"] = peak
        for tokens in lengths:
            runs = [_segments_of_one(engine, rng, tokens) for _ in range(rounds)]
            report.rows += rows_of(graph, tokens, runs, peak)
        read_bytes_per_s = max(measured.read_bytes_per_s for measured in ceilings)
        decode_rows = _measure_decode(engine, graph, args, rng, read_bytes_per_s)
        if decode_rows:
            report.extra |= {"read_bytes_per_s": read_bytes_per_s, "decode_rows": decode_rows}
    title = f"Where the time goes, {engine.dtype}, {engine.threads} threads"
    print_table(f"{title}: prefill", report.rows, COLUMNS)
    if decode_rows:
        print_table(f"{title}: one decode step", decode_rows, DECODE_COLUMNS)
    report.write(args.json)
    return 0


def _measure_decode(
    engine: Engine,
    graph: ModelGraph,
    args: argparse.Namespace,
    rng: random.Random,
    read_bytes_per_s: float,
) -> list[Row]:
    """Return the rows of decode steps."""
    if engine.describe()["device"] != "cpu" or not args.decode:
        return []
    rows: list[Row] = []
    steps = QUICK_DECODE_STEPS if args.quick else DECODE_STEPS
    for sequences in args.decode:
        check_least("decode", sequences, 1)
        runs: list[list[TimelineEntry]] = []
        for _ in range(1 if args.quick else args.rounds):
            runs += _decode_steps(engine, rng, sequences, steps)
        of_cache = 2 if engine.dtype == "bf16" else 4
        shape = engine.model_shape
        elements = sum(count for _, count in graph.products())
        of_weights = (shape.weight_bytes + shape.head_bytes) / elements
        context = DECODE_CONTEXT + steps // 2
        element_bytes = ElementBytes(of_weights, of_cache)
        rows += decode_rows_of(graph, sequences, context, element_bytes, runs, read_bytes_per_s)
    return rows


def _decode_steps(
    engine: Engine, rng: random.Random, sequences: int, steps: int
) -> list[list[TimelineEntry]]:
    """Decode some sequences together; returns the segments of each step of them all.

    Those that are prefilled first take steps without the others meanwhile: where no token is left
    when the last one joins, all get more of them.
    """
    found: list[list[TimelineEntry]] = []
    while not found and steps <= MOST_DECODE_STEPS:
        found = _steps_of_all(engine, rng, sequences, steps)
        steps *= 4
    return found


def _steps_of_all(
    engine: Engine, rng: random.Random, sequences: int, steps: int
) -> list[list[TimelineEntry]]:
    before = engine.stats().segments
    params = SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True)
    handles = [
        engine.submit(Request(random_ids(rng, DECODE_CONTEXT, engine.vocab_size), params))
        for _ in range(sequences)
    ]
    for handle in handles:
        handle.result(600)
    by_run: dict[int, list[TimelineEntry]] = {}
    for entry in engine.timeline(before):
        if entry.run == f"decode of {sequences}":
            by_run.setdefault(entry.run_id, []).append(entry)
    return list(by_run.values())


def _segments_of_one(engine: Engine, rng: random.Random, tokens: int) -> list[TimelineEntry]:
    """Prefill one prompt; returns its segments in order."""
    before = engine.stats().segments
    first_token_s(engine, random_ids(rng, tokens, engine.vocab_size))
    return engine.timeline(before)


def seconds_of_groups(runs: Sequence[Sequence[TimelineEntry]]) -> dict[str, float]:
    """Return the time of each group of operators in one run, the sum over layers, by its first.

    Medians over runs.
    """
    seconds: dict[str, list[float]] = {}
    for segments in runs:
        total: dict[str, float] = {}
        for entry in segments:
            name = entry.segment.split()[0]
            total[name] = total.get(name, 0.0) + entry.end_s - entry.start_s
        for name, one in total.items():
            seconds.setdefault(name, []).append(one)
    return {name: median(taken) for name, taken in seconds.items()}


def rows_of(
    graph: ModelGraph, tokens: int, runs: Sequence[Sequence[TimelineEntry]], peak: float
) -> list[Row]:
    """Return one row for each group of operators, the sum over all layers, medians over runs."""
    seconds = seconds_of_groups(runs)
    whole = sum(seconds.values())
    flops = flops_of_groups(graph, list(seconds), tokens)
    return [
        {
            "tokens": tokens,
            "operators": group,
            "seconds": seconds[first],
            "share": seconds[first] / whole,
            "gflops": work / seconds[first] / 1e9,
            "of_peak": work / seconds[first] / peak,
        }
        for first, (group, work) in flops.items()
    ]


def decode_rows_of(
    graph: ModelGraph,
    sequences: int,
    context: int,
    element_bytes: ElementBytes,
    runs: Sequence[Sequence[TimelineEntry]],
    read_bytes_per_s: float,
) -> list[Row]:
    """Return one row for each group of operators of a decode step, and one for all together.

    Args:
        context: tokens that each sequence has in the cache.
        runs: the segments of each step.
    """
    if not runs:
        return []
    seconds = seconds_of_groups(runs)
    whole = sum(seconds.values())
    groups = bytes_of_groups(graph, list(seconds), sequences, context, element_bytes)
    taken = [(group, work, seconds[first]) for first, (group, work) in groups.items()]
    taken.append(("all", sum(work for _, work in groups.values()), whole))
    return [
        {
            "sequences": sequences,
            "operators": group,
            "seconds": took_s,
            "share": took_s / whole,
            "gb_per_s": work / took_s / 1e9,
            "of_read": work / took_s / read_bytes_per_s,
        }
        for group, work, took_s in taken
    ]


def flops_of_groups(
    graph: ModelGraph, firsts: Sequence[str], tokens: int
) -> dict[str, tuple[str, float]]:
    """Return what each segment of a prefill computes, by its first operator's name.

    Args:
        firsts: names of the operators that begin a segment.

    Returns:
        The heavy operators of the segment, and their operations over all layers: 2 for each weight
        and row, 4 times the columns of the queries for each (token, visible token) pair.
    """
    per_pair = 4.0 * graph.num_heads * graph.head_dim

    def work_of(operator: Operator, elements: int) -> float:
        if operator.kind in PRODUCTS:
            return 2.0 * (tokens if operator.layer >= 0 else 1) * elements * operator.share
        keys = min(operator.window or tokens, tokens)
        return per_pair * (attention_pairs(tokens, 0) - attention_pairs(tokens - keys, 0))

    return _work_of_groups(graph, firsts, work_of)


def bytes_of_groups(
    graph: ModelGraph,
    firsts: Sequence[str],
    sequences: int,
    context: int,
    element_bytes: ElementBytes,
) -> dict[str, tuple[str, float]]:
    """Return what each segment of a decode step reads, as `flops_of_groups` does.

    Weights once, keys and values of every sequence once.
    """
    per_key = 2.0 * graph.num_kv_heads * graph.head_dim * element_bytes.cache

    def work_of(operator: Operator, elements: int) -> float:
        if operator.kind in PRODUCTS:
            met = 1.0 - (1.0 - operator.share) ** sequences  # of the experts; 1: no mixture
            return elements * met * element_bytes.weight
        return sequences * min(operator.window or context, context) * per_key

    return _work_of_groups(graph, firsts, work_of)


def _work_of_groups(
    graph: ModelGraph, firsts: Sequence[str], work_of: Callable[[Operator, int], float]
) -> dict[str, tuple[str, float]]:
    """Add up the work of products and attention; `work_of` takes an operator and its weights."""
    elements = {operator.name: 0 for operator in graph.operators}
    for operator, count in graph.products():
        elements[operator.name] += count
    groups: dict[str, tuple[list[str], float]] = {}
    first = ""
    for operator in graph.operators:
        if operator.name in firsts:
            first = operator.name
        names, work = groups.setdefault(first, ([], 0.0))
        if operator.kind not in (*PRODUCTS, "attention"):
            continue
        if operator.name not in names:
            names.append(operator.name)
        groups[first] = (names, work + work_of(operator, elements.pop(operator.name, 0)))
    return {name: (", ".join(ops) or name, work) for name, (ops, work) in groups.items() if name}
