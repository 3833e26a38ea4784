"""What benches share before they measure: common flags, the engine, random prompts."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from flowprefill.bench.report import json_path
from flowprefill.config import QUANTIZATIONS, EngineConfig
from flowprefill.engine import Engine
from flowprefill.errors import ConfigError
from flowprefill.native import _core
from flowprefill.request import SLO, Request, SamplingParams

FIRST_TOKEN_ONLY = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
LOWEST_RANDOM_ID = 100  # below are special tokens in most vocabularies
MODEL_HELP = "name, folder or .gguf file"


def add_model_arguments(parser: argparse.ArgumentParser, model_help: str = MODEL_HELP) -> None:
    """Add the flags that name a model and how it is computed."""
    parser.add_argument("--model", default="smollm2-135m", help=model_help)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "f32"))
    parser.add_argument("--threads", type=int, default=0, help="0 is one per available core")


def add_engine_arguments(parser: argparse.ArgumentParser, model_help: str = MODEL_HELP) -> None:
    """Add the flags that `load_engine` reads."""
    add_model_arguments(parser, model_help)
    parser.add_argument("--quantization", default="auto", choices=QUANTIZATIONS)
    parser.add_argument(
        "--background", action="store_true", help="compute threads under SCHED_IDLE"
    )


def add_common_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the flags that every bench has."""
    add_engine_arguments(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N, default auto")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and arrival times")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: the figures mean little"
    )
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the report there")


def add_lengths(parser: argparse.ArgumentParser, lengths: Sequence[int]) -> None:
    """Add the flag ``--tokens`` for the lengths of the prompts."""
    default = " ".join(map(str, lengths))
    parser.add_argument(
        "--tokens", type=int, nargs="+", metavar="N", help=f"prompt lengths, default {default}"
    )


def check_common(args: argparse.Namespace) -> None:
    """Refuse values out of range.

    Raises:
        ConfigError: names flag, value and what is allowed.
    """
    check_least("rounds", args.rounds, 1)
    check_least("threads", args.threads, 0)


def check_least(name: str, value: float, least: float) -> None:
    """Raise ConfigError unless value >= least."""
    if not value >= least:
        raise ConfigError(f"{name}: got {value}, expected a number >= {least:g}", param=name)


def load_engine(args: argparse.Namespace, **settings: Any) -> Engine:
    """Load the model that the flags name; no prefix cache, so no prompt profits from another."""
    names = ("dtype", "quantization", "threads", "background")
    settings |= {name: getattr(args, name) for name in names}
    settings.setdefault("device", getattr(args, "device", "auto"))
    config = EngineConfig(prefix_cache=False, **settings)
    say(f"loading {args.model}")
    engine = Engine(args.model, config)
    engine.freeze_garbage()
    return engine


class Ceilings(NamedTuple):
    """What the device can do at most; ``read_bytes_per_s``: of weights in DRAM, 0 on a GPU."""

    flops_per_s: float
    read_bytes_per_s: float


def measure_ceilings(engine: Engine) -> Ceilings:
    """Return what the device can do at most.

    Of a CPU: the instruction of its products, with operands in registers, on the engine's threads
    (`flowprefill doctor`), half a second; of a GPU: the products that calibration measured.
    """
    found = engine.describe()
    if found["device"] != "cpu":
        return Ceilings(engine.rates.gemm_flops_per_s, 0.0)
    measured = _core.measure_ceilings(engine.threads)
    return Ceilings(_peak_flops_per_s(engine, measured), measured["reads"][-1][1])


def _peak_flops_per_s(engine: Engine, ceilings: _core.Ceilings) -> float:
    found = engine.describe()
    if found["quantization"] == "int8":
        return ceilings["int8"]
    return ceilings["bf16"] if engine.dtype == "bf16" else ceilings["f32"]


def check_lengths(engine: Engine, lengths: list[int]) -> None:
    """Raise ConfigError for a prompt length that the engine would refuse."""
    for tokens in lengths:
        if not 1 <= tokens < engine.max_model_len:
            allowed = f"1 to {engine.max_model_len - 1} tokens"
            raise ConfigError(f"tokens: got {tokens}, expected {allowed}", param="tokens")


def random_ids(rng: random.Random, tokens: int, vocab_size: int) -> list[int]:
    """Return a prompt like no other; only its length matters to the time of its prefill."""
    lowest = min(LOWEST_RANDOM_ID, vocab_size - 1)
    return [rng.randrange(lowest, vocab_size) for _ in range(tokens)]


def first_token_s(engine: Engine, ids: list[int], slo: SLO | None = None) -> float:
    """Prefill one prompt and return its time to first token, seconds."""
    completion = engine.submit(Request(ids, FIRST_TOKEN_ONLY), slo or SLO()).result(600)
    assert completion.timings.ttft is not None
    return completion.timings.ttft


def say(text: str) -> None:
    """Tell the user on stderr what is going on."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
