"""`make demo`: one answer of the real model, then short prompts during a long one, twice.

First with preemption off (granularity ``none``), then on (``budget:2``): the same prompts at the
same times. Prints a table and leaves a picture and a trace of both timelines in a folder. Runs as
``python -m flowprefill.bench.demo`` and ends after the second time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from flowprefill.bench.hol import prepare
from flowprefill.bench.mixed_round import Round, Workload, measure_round
from flowprefill.bench.picture import draw
from flowprefill.bench.report import Row, print_table
from flowprefill.bench.statistics import median
from flowprefill.bench.trace_file import write_trace
from flowprefill.config import EngineConfig
from flowprefill.engine import Engine
from flowprefill.errors import FlowPrefillError
from flowprefill.request import Request, SamplingParams

OFF, ON = "none", "budget:2"
QUESTION = "What is the capital of France? Answer in one sentence."
COLUMNS = {
    "case": "preemption",
    "alone_s": "short alone ms",
    "during_s": "during the long one ms",
    "worst_s": "worst ms",
    "blocking_s": "longest blocking ms",
    "long_s": "long prompt s",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the demo."""
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or .gguf file")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files")
    parser.add_argument("--long-tokens", type=int, default=7500)
    parser.add_argument("--short-tokens", type=int, default=64)
    parser.add_argument("--shorts", type=int, default=12)
    parser.add_argument("--seed", type=int, default=3)
    parser.set_defaults(short_ttft_ms=0.0)


def run(args: argparse.Namespace) -> int:
    """Show it; returns the exit status."""
    console = Console(soft_wrap=True)
    args.out.mkdir(parents=True, exist_ok=True)
    console.print(f"Loading {args.model} (the first time, the machine is measured: some seconds) …")
    with Engine(args.model, EngineConfig(prefix_cache=False)) as engine:
        about = engine.describe()
        where = about.get("gpu") or f"{about['threads']} CPU threads, {about['isa']}"
        console.print(f"{about['dtype']} on {where}\n")
        greet(engine, console)
        rounds = measure(engine, args, console)
    print_table(
        f"Short prompts of {args.short_tokens} tokens during one of {args.long_tokens:,} tokens",
        [_row(one) for one in rounds],
        COLUMNS,
    )
    _write(rounds, args.out, console)
    return 0


def greet(engine: Engine, console: Console) -> None:
    """Let the model answer a question, token by token."""
    messages = [{"role": "user", "content": QUESTION}]
    prompt = engine.render_chat(messages, add_generation_prompt=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=64)
    console.print(f"You:    {QUESTION}", highlight=False)
    console.print("Model:  ", end="")
    handle = engine.submit(Request(prompt, sampling, add_special_tokens=False))
    for token in handle:
        console.print(token.text, end="", highlight=False, markup=False)
    timings = handle.result(60).timings
    between_s = timings.mean_itl or 0.0
    console.print(
        f"\n        [dim]first token after {1e3 * (timings.ttft or 0):.0f} ms, "
        f"then one every {1e3 * between_s:.0f} ms[/dim]\n"
    )


def measure(engine: Engine, args: argparse.Namespace, console: Console) -> list[Round]:
    """Return the round with preemption off and the one with it on."""
    engine.set_granularity(ON)
    workload, span_s = prepare(engine, args)
    return [_measure(engine, name, workload, span_s, args.seed, console) for name in (OFF, ON)]


def _measure(
    engine: Engine, granularity: str, workload: Workload, span_s: float, seed: int, console: Console
) -> Round:
    state = "off" if granularity == OFF else "on"
    console.print(
        f"Preemption {state}: one prompt of {workload.long_tokens:,} tokens, and {workload.shorts} "
        f"short ones arriving while it is prefilled …"
    )
    return measure_round(engine, granularity, workload, span_s, seed)


def _row(one: Round) -> Row:
    during = [short.ttft_s for short in one.shorts]
    return {
        "case": f"{'off' if one.granularity == OFF else 'on'} ({one.granularity})",
        "alone_s": median(one.short_alone_s),
        "during_s": median(during),
        "worst_s": max(during),
        "blocking_s": max(one.blocking_s(), default=None),
        "long_s": one.long.ttft_s,
    }


def _write(rounds: list[Round], folder: Path, console: Console) -> None:
    trace = folder / "demo-trace.json"
    write_trace(rounds, trace)
    console.print(f"\ntimeline:  {trace}  (open it at https://ui.perfetto.dev or chrome://tracing)")
    try:
        draw(rounds[0], rounds[1], folder / "demo.png")
    except ModuleNotFoundError as error:
        console.print(f"no picture: {error} (pip install matplotlib)")
        return
    console.print(f"picture:   {folder / 'demo.png'}")


def main() -> int:
    """Parse the command line and run; every expected error is one line."""
    parser = argparse.ArgumentParser(description="Short prompts during a long one, twice.")
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except (FlowPrefillError, OSError) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
