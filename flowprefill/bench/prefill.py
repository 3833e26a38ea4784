"""`flowprefill bench prefill`: prefill throughput by prompt length, against transformers.

All engines run the same weights in the same element type on the same threads, in turn within every
round, so that a change of the machine's speed meets all of them. A row's time for `flowprefill` is
the time to first token, from `submit`; for transformers it is the forward call and the choice of
the token. The report adds the measured peak of the processor's instruction, and the tokens per
second that it would allow if every operation of the model went at that rate (`ceiling`). With
``--peers`` it compares with other engines instead (`peers.py`).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping

from flowprefill.bench import peers
from flowprefill.bench.common import (
    add_common_arguments,
    add_lengths,
    check_common,
    check_lengths,
    first_token_s,
    load_engine,
    measure_ceilings,
    random_ids,
    say,
)
from flowprefill.bench.report import Report, Row, print_table
from flowprefill.bench.statistics import median
from flowprefill.engine import Engine
from flowprefill.scheduling.cost_model import ModelShape, attention_pairs

LENGTHS = (128, 512, 2048, 7500)
QUICK_LENGTHS = (64, 256)
ATTENTIONS = ("eager", "sdpa")
SHORT_TOKENS = 1024  # up to here a length is measured several times per round
SHORT_REPEATS = 3
SLOW_S = 20.0  # what takes longer than this is measured once, not in every round
COLUMNS = {
    "engine": "engine",
    "tokens": "tokens",
    "tokens_per_s": "tokens/s",
    "min": "min",
    "max": "max",
    "of_ceiling": "of ceiling %",
    "flowprefill_faster": "flowprefill is x times as fast",
}

# Prefills one prompt and returns the seconds it took.
Prefill = Callable[[list[int]], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench prefill``."""
    add_common_arguments(parser, rounds=3)
    add_lengths(parser, LENGTHS)
    parser.add_argument("--granularity", default="budget:2", help="of flowprefill")
    parser.add_argument(
        "--only-flowprefill", action="store_true", help="do not measure transformers"
    )
    peers.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    check_common(args)
    lengths = args.tokens or list(QUICK_LENGTHS if args.quick else LENGTHS)
    rounds = 1 if args.quick else args.rounds
    if args.peers is not None:
        return peers.run(args, lengths, rounds)
    settings = {"model": args.model, "rounds": rounds, "seed": args.seed, "tokens": lengths}
    report = Report("prefill", settings)
    with load_engine(args, granularity=args.granularity) as engine:
        check_lengths(engine, lengths)
        report.settings["engine"] = engine.describe()
        engines = _engines(engine, args)
        rates, seconds = measure(engine, engines, lengths, rounds, args.seed)
        shape = engine.model_shape
        report.extra["peak_flops_per_s"] = max(rates)
    report.rows = rows_of(seconds, shape, max(rates))
    print_table(f"Prefill, {engine.dtype}, {engine.threads} threads", report.rows, COLUMNS)
    say(f"peak: {max(rates) / 1e9:.0f} GFLOP/s")
    report.write(args.json)
    return 0


def _engines(engine: Engine, args: argparse.Namespace) -> dict[str, Prefill]:
    engines: dict[str, Prefill] = {"flowprefill": lambda ids: first_token_s(engine, ids)}
    if args.only_flowprefill:
        return engines
    from flowprefill.bench.transformers_model import TransformersModel

    say("loading the same weights into transformers")
    other = TransformersModel(args.model, engine.dtype, engine.threads)

    def with_attention(attention: str) -> Prefill:
        return lambda ids: other.prefill_s(ids, attention)

    for attention in ATTENTIONS:
        engines[f"transformers {engine.dtype} {attention}"] = with_attention(attention)
    return engines


def measure(
    engine: Engine, engines: Mapping[str, Prefill], lengths: list[int], rounds: int, seed: int
) -> tuple[list[float], dict[tuple[str, int], list[float]]]:
    """Measure every engine at every length, in turn.

    Returns:
        The peak of the device, FLOP/s, of every round; seconds by engine and length.
    """
    rng = random.Random(seed)
    names = list(engines)
    for name in names:  # first use of memory and kernels
        engines[name](random_ids(rng, min(256, max(lengths)), engine.vocab_size))
    rates: list[float] = []
    seconds: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds):
        rates.append(measure_ceilings(engine).flops_per_s)
        for tokens in lengths:
            order = names[number % len(names) :] + names[: number % len(names)]
            for name in order * (SHORT_REPEATS if tokens <= SHORT_TOKENS else 1):
                taken = seconds.setdefault((name, tokens), [])
                if taken and max(taken) > SLOW_S:
                    continue
                took_s = engines[name](random_ids(rng, tokens, engine.vocab_size))
                taken.append(took_s)
                say(f"round {number + 1}/{rounds}  {tokens:5} tokens  {took_s:7.3f} s  {name}")
    return rates, seconds


def flops_of(tokens: int, shape: ModelShape) -> float:
    """Return the operations of one prompt's prefill; of attention only what causality leaves."""
    attention = attention_pairs(tokens, 0) * shape.attention_flops_per_pair
    return tokens * shape.linear_flops_per_token + attention + shape.head_flops_per_sequence


def rows_of(
    seconds: Mapping[tuple[str, int], list[float]], shape: ModelShape, peak_flops_per_s: float
) -> list[Row]:
    """Return one row for each length and engine, median and range over all measurements."""
    rows = []
    for (name, tokens), took in sorted(seconds.items(), key=lambda item: item[0][1]):
        rate = tokens / median(took)
        ceiling = tokens / (flops_of(tokens, shape) / peak_flops_per_s)
        ours = median(seconds["flowprefill", tokens])
        row: Row = {
            "engine": name,
            "tokens": tokens,
            "tokens_per_s": rate,
            "min": tokens / max(took),
            "max": tokens / min(took),
            "ceiling_tokens_per_s": ceiling,
            "of_ceiling": rate / ceiling,
            "samples": len(took),
        }
        if name != "flowprefill":
            row["flowprefill_faster"] = median(took) / ours
        rows.append(row)
    return rows
