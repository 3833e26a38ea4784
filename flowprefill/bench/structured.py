"""`flowprefill bench structured`: what structured output costs the others of a batch, and itself.

In each round the same prompts decode together three times, in an order that changes: all free, one
bound by a grammar, all bound. The grammar's text is as long as everyone's, so the batch stays the
same. Then typical schemas are compiled, each under a title that makes it new.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping
from typing import Any

from flowprefill.bench.common import (
    LOWEST_RANDOM_ID,
    add_common_arguments,
    check_common,
    check_least,
    load_engine,
    random_ids,
    say,
)
from flowprefill.bench.report import Report, Row, print_table
from flowprefill.bench.statistics import median, quantiles
from flowprefill.engine import Engine
from flowprefill.request import Request, SamplingParams, StructuredOutput

PROMPT_TOKENS = 16
CASES = ("all free", "one bound", "all bound")
COLUMNS = {
    "case": "batch",
    "free_itl_s": "free: between tokens ms",
    "free_over_all_free": "over all free",
    "bound_itl_s": "bound: between tokens ms",
    "bound_tokens_per_s": "bound: tokens/s each",
}
COMPILE_COLUMNS = {"schema": "schema", "compile_p50_s": "compile p50 ms", "compile_max_s": "max ms"}
TEXT = {"type": "string", "maxLength": 60}
SCHEMAS: Mapping[str, dict[str, Any]] = {
    "two fields": {
        "type": "object",
        "properties": {"name": TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
    },
    "forty fields": {
        "type": "object",
        "properties": {f"field_{i}": TEXT for i in range(40)},
        "required": [f"field_{i}" for i in range(40)],
    },
    "list of nested objects": {
        "type": "array",
        "maxItems": 20,
        "items": {
            "type": "object",
            "properties": {
                "at": {"type": "string", "format": "date-time"},
                "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 5},
                "place": {"type": "object", "properties": {"city": TEXT, "street": TEXT}},
            },
            "required": ["at", "tags", "place"],
        },
    },
    "recursive tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "name": TEXT,
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["name"],
            }
        },
    },
    "two hundred words": {"enum": [f"word number {i}" for i in range(200)]},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench structured``."""
    add_common_arguments(parser, rounds=9)
    parser.add_argument("--batch", type=int, default=8, help="sequences, default 8")
    parser.add_argument("--output-tokens", type=int, default=128, help="of each, default 128")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the JSON."""
    check_common(args)
    check_least("batch", args.batch, 2)
    check_least("output_tokens", args.output_tokens, 8)
    if args.quick:
        args.rounds, args.output_tokens = 1, min(args.output_tokens, 24)
    names = ("model", "rounds", "seed", "batch", "output_tokens")
    report = Report("structured", {name: getattr(args, name) for name in names})
    rounds: list[dict[str, Row]] = []
    with load_engine(args) as engine:
        report.settings["engine"] = engine.describe()
        engine.warm_structured()
        measure(engine, CASES[1], args, random.Random(0))  # not counted
        for number in range(args.rounds):
            say(f"round {number + 1}/{args.rounds}")
            order = list(CASES)
            random.Random(args.seed + number).shuffle(order)
            rounds.append(
                {name: measure(engine, name, args, random.Random(number)) for name in order}
            )
        compiled = [compile_row(engine, name, args.rounds) for name in SCHEMAS]
    report.rows = [row_of(name, rounds) for name in CASES]
    report.extra["compile"] = compiled
    print_table("Decoding in one batch", report.rows, COLUMNS)
    print_table("Compiling a schema", compiled, COMPILE_COLUMNS)
    report.write(args.json)
    return 0


def measure(engine: Engine, case: str, args: argparse.Namespace, rng: random.Random) -> Row:
    """Decode one batch; returns the mean time between tokens of the free and the bound, seconds."""
    tokens = args.output_tokens
    bound = {"all free": 0, "one bound": 1, "all bound": args.batch}[case]
    # An item takes a token or more: no text ends before max_tokens.
    items = {"type": "array", "minItems": tokens, "items": TEXT}
    structured = StructuredOutput.from_schema(items)
    requests = [
        Request(
            random_ids(rng, PROMPT_TOKENS, engine.vocab_size),
            SamplingParams(
                temperature=0.0, max_tokens=tokens, ignore_eos=True,
                structured=structured if number < bound else None,
            ),
        )
        for number in range(args.batch)
    ]  # fmt: skip
    handles = [engine.submit(request) for request in requests]
    itls_s = [handle.result(600).timings.mean_itl or 0.0 for handle in handles]
    return {
        "bound": sum(itls_s[:bound]) / bound if bound else None,
        "free": sum(itls_s[bound:]) / (args.batch - bound) if bound < args.batch else None,
    }


def row_of(case: str, rounds: list[dict[str, Row]]) -> Row:
    """Return the row of one kind of batch: medians over the rounds."""

    def over_rounds(name: str) -> float | None:
        values = [one[case][name] for one in rounds if one[case][name] is not None]
        return median(values) if values else None

    ratios = [
        one[case]["free"] / one["all free"]["free"]
        for one in rounds
        if one[case]["free"] is not None
    ]
    bound_s = over_rounds("bound")
    return {
        "case": case,
        "free_itl_s": over_rounds("free"),
        "free_over_all_free": median(ratios) if ratios else None,
        "bound_itl_s": bound_s,
        "bound_tokens_per_s": 1 / bound_s if bound_s else None,
    }


def compile_row(engine: Engine, name: str, rounds: int) -> Row:
    """Submit requests of a schema that was never sent before; returns how long submit() took."""
    times_s = []
    for number in range(max(rounds, 3)):
        text = json.dumps(SCHEMAS[name] | {"title": f"{name} {number}"})
        params = SamplingParams(structured=StructuredOutput("json_schema", text), max_tokens=1)
        request = Request([LOWEST_RANDOM_ID], params)
        start_s = time.monotonic()
        handle = engine.submit(request)
        times_s.append(time.monotonic() - start_s)
        handle.result(600)
    return {"schema": name, **quantiles("compile", times_s, (0.5, 1))}
