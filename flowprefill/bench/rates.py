"""`flowprefill bench rates`: how a wrong calibration is mended by what executes.

The machine is calibrated, the rates that are kept are multiplied by a factor, as if they had been
measured while others computed, and an engine starts with them (its check at the start, which would
measure again, is switched off). Prompts of random lengths then come one after another for some
seconds. Predicted against executed time of prompts, and the length of their segments, are shown as
they are by the calibration alone and after that traffic; then what the next start would find.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path
from unittest import mock

from flowprefill.bench.common import (
    FIRST_TOKEN_ONLY,
    add_common_arguments,
    add_lengths,
    check_common,
    check_least,
    check_lengths,
    load_engine,
    random_ids,
    say,
)
from flowprefill.bench.report import Report, Row, print_table
from flowprefill.bench.statistics import median
from flowprefill.engine import Engine, calibration
from flowprefill.request import Request, SamplingParams
from flowprefill.scheduling import CostModel

LENGTHS = (128, 512, 2048, 7500)
QUICK_LENGTHS = (32, 64)
SHORTEST = 16  # prompt of the traffic
DECODED = 16  # tokens that each of them generates
COLUMNS = {
    "tokens": "tokens",
    "executed_s": "executed ms",
    "calibrated_s": "predicted at start, ms",
    "calibrated_error": "off %",
    "predicted_s": "predicted then, ms",
    "error": "off %",
    "first_segment_s": "segment p50 at start, ms",
    "segment_s": "segment p50 then, ms",
}
RATE_COLUMNS = {
    "rate": "rate",
    "true": "as calibrated",
    "at_start": "of that at start %",
    "learnt": "learnt %",
    "kept": "kept for the next start %",
}
RATES = {
    "products": "gemm_flops_per_s",
    "weights": "weight_bytes_per_s",
    "attention": "attention_flops_per_s",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench rates``."""
    add_common_arguments(parser, rounds=3)
    add_lengths(parser, LENGTHS)
    parser.add_argument(
        "--factor", type=float, default=0.5, help="kept over calibrated rates, default 0.5"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of traffic before the second look, default 20"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the JSON."""
    check_common(args)
    check_least("factor", args.factor, 1e-3)
    check_least("seconds", args.seconds, 0)
    lengths = args.tokens or list(QUICK_LENGTHS if args.quick else LENGTHS)
    rounds, seconds = (1, 1.0) if args.quick else (args.rounds, args.seconds)
    report = Report(
        "rates", {"model": args.model, "rounds": rounds, "seed": args.seed, "tokens": lengths,
                  "factor": args.factor, "seconds": seconds},
    )  # fmt: skip
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        with load_engine(args, cache_dir=folder) as engine:
            true = engine.rates
        _multiply_kept(Path(folder), args.factor)
        busy = mock.patch.object(calibration, "were_measured_busy", return_value=False)
        with busy, load_engine(args, cache_dir=folder) as engine:
            check_lengths(engine, lengths)
            report.settings["engine"] = engine.describe()
            report.rows = _look(engine, rng, lengths, rounds, seconds)
            start, learnt = engine.rates, engine.corrections
        kept = json.loads(next(Path(folder).glob("rates-*.json")).read_text())["rates"]
    rates: list[Row] = [
        {
            "rate": name,
            "true": (of_true := getattr(true, field)),
            "at_start": getattr(start, field) / of_true,
            "learnt": getattr(start, field) / getattr(learnt, name) / of_true,
            "kept": kept[field] / of_true,
        }
        for name, field in RATES.items()
    ]
    report.extra["rates"] = rates
    print_table("Predicted and executed time of prompts", report.rows, COLUMNS)
    print_table("Rates", rates, RATE_COLUMNS)
    report.write(args.json)
    return 0


def _multiply_kept(folder: Path, factor: float) -> None:
    """Make the rates that are kept there so many times what they are; not the overhead."""
    path = next(folder.glob("rates-*.json"))
    content = json.loads(path.read_text())
    for name in RATES.values():
        content["rates"][name] *= factor
    path.write_text(json.dumps(content))


def _look(
    engine: Engine, rng: random.Random, lengths: list[int], rounds: int, seconds: float
) -> list[Row]:
    """Return a row for each length: by the calibration alone, and after so much traffic."""
    at_start = CostModel(engine.model_shape, engine.rates)
    _, _, first_segment_s = _prefill(engine, rng, max(lengths))
    say(f"traffic for {seconds:g} s")
    longest = max(lengths)
    until_s = time.monotonic() + seconds
    params = SamplingParams(temperature=0.0, max_tokens=DECODED, ignore_eos=True)
    while time.monotonic() < until_s:
        tokens = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(longest - DECODED))))
        engine.submit(Request(random_ids(rng, tokens, engine.vocab_size), params)).result(600)
    rows: list[Row] = []
    for tokens in lengths:
        looks = [_prefill(engine, rng, tokens) for _ in range(rounds)]
        predicted_s, executed_s, segment_s = (
            median(list(each)) for each in zip(*looks, strict=True)
        )
        calibrated_s = at_start.prefill_s(tokens)
        rows.append(
            {
                "tokens": tokens,
                "executed_s": executed_s,
                "calibrated_s": calibrated_s,
                "calibrated_error": calibrated_s / executed_s - 1.0,
                "predicted_s": predicted_s,
                "error": predicted_s / executed_s - 1.0,
                "first_segment_s": first_segment_s if tokens == longest else None,
                "segment_s": segment_s,
            }
        )
    return rows


def _prefill(engine: Engine, rng: random.Random, tokens: int) -> tuple[float, float, float]:
    """Prefill one prompt; returns its predicted and executed time and its median segment."""
    before = engine.stats().segments
    ids = random_ids(rng, tokens, engine.vocab_size)
    timings = engine.submit(Request(ids, FIRST_TOKEN_ONLY)).result(600).timings
    assert timings.predicted_ttft is not None
    segments = [entry.end_s - entry.start_s for entry in engine.timeline(before)]
    return timings.predicted_ttft, timings.prefill_run, median(segments)
