"""`flowprefill bench quality`: what numbers of fewer bits cost, in perplexity of a text.

The text is cut into passages of equal length, each a sequence of its own. All are fed side by side,
token after token, in decode steps, and each step's logits are read. Every kind of numbers computes
the same; they are compared with the first one, float32.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flowprefill.bench.common import check_least
from flowprefill.bench.report import Report, Row, json_path, print_table
from flowprefill.config import EngineConfig, Granularity
from flowprefill.engine.calibration import execute
from flowprefill.engine.cpu_device import CpuDevice
from flowprefill.engine.loading import fill_model, plan_options
from flowprefill.errors import ConfigError
from flowprefill.models.checkpoint import Checkpoint, open_checkpoint
from flowprefill.scheduling.cost_model import MachineRates

TEXT = Path(__file__).with_name("quality.txt")
NUMBERS = ("f32", "bf16", "f32+int8", "bf16+int8")
OF_GGUF = ("f32+gguf", "bf16+gguf")  # of files that have such weights
BLOCK_TOKENS = 16
COLUMNS = {
    "numbers": "numbers",
    "perplexity": "perplexity",
    "change": "change %",
    "error": "its error %",
    "agreement": "same token %",
    "weights": "weights MiB",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench quality``."""
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or .gguf file")
    parser.add_argument("--text", type=Path, default=TEXT, help="default: prose that comes with it")
    parser.add_argument("--tokens", type=int, default=96, help="of a passage, default 96")
    parser.add_argument("--passages", type=int, default=16, help="at most, default 16")
    parser.add_argument(
        "--numbers",
        nargs="+",
        default=NUMBERS,
        choices=NUMBERS + OF_GGUF,
        help="default: all but gguf; first: f32",
    )
    parser.add_argument("--threads", type=int, default=0, help="0 is one per available core")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the report there")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    check_least("tokens", args.tokens, 2)
    check_least("passages", args.passages, 1)
    checkpoint = open_checkpoint(args.model)
    passages = passages_of(checkpoint, args.text, args.tokens, args.passages)
    settings = {"model": args.model, "passages": passages.shape[0], "tokens": args.tokens}
    report = Report("quality", settings)
    scores = {name: score(checkpoint, passages, name, args.threads) for name in args.numbers}
    report.rows = rows_of(scores)
    print_table(f"{passages.size} tokens in {passages.shape[0]} passages", report.rows, COLUMNS)
    report.write(args.json)
    return 0


def passages_of(
    checkpoint: Checkpoint, text: Path, tokens: int, most: int
) -> npt.NDArray[np.int32]:
    """Return passages [passages, tokens] of a text, one after the other; its end is left out.

    Raises:
        ConfigError: the text is shorter than one passage, or no text.
    """
    try:
        ids = checkpoint.tokenizer.encode(text.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text: cannot read {text}: {error}", param="text") from None
    count = min(len(ids) // tokens, most)
    if count < 1:
        raise ConfigError(
            f"text: got {len(ids)} tokens in {text}, expected at least {tokens}", param="text"
        )
    return np.array(ids[: count * tokens], np.int32).reshape(count, tokens)


@dataclass(frozen=True)
class Score:
    """What a model with some numbers makes of the passages.

    Attributes:
        log_probs: of each token but a passage's first, given those before it, natural logarithm.
        choices: the most probable token in its place.
        weight_bytes: memory of the weights.
    """

    log_probs: npt.NDArray[np.float64]
    choices: npt.NDArray[np.int64]
    weight_bytes: int

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-probability."""
        return math.exp(-float(self.log_probs.mean()))


def score(
    checkpoint: Checkpoint, passages: npt.NDArray[np.int32], numbers: str, threads: int = 0
) -> Score:
    """Feed the passages to a model on the CPU.

    Args:
        passages: [passages, tokens].
        numbers: ``bf16``, or ``bf16+int8`` for a dtype and a quantization.

    Raises:
        ConfigError: this processor does not multiply those numbers.
    """
    dtype, _, quantization = numbers.partition("+")
    settings = EngineConfig(dtype=dtype, quantization=quantization or "none", threads=threads)
    device = CpuDevice(settings, "bench")
    model = device.make_model(checkpoint)
    fill_model(model, checkpoint, in_blocks=device.block_formats(checkpoint))
    count, length = passages.shape
    blocks = -(-length // BLOCK_TOKENS)
    model.allocate_cache(BLOCK_TOKENS, count * blocks)
    tables = np.arange(count * blocks, dtype=np.int32).reshape(count, blocks)
    plan = plan_options(device.native, Granularity("none"), MachineRates())
    executor = device.start_executor(model, plan)
    log_probs, choices = [], []
    try:
        for position in range(length - 1):
            sequences = [
                device.native.BatchSequence(rows=1, context=position, block_table=table)
                for table in tables
            ]
            batch = device.native.Batch(np.ascontiguousarray(passages[:, position]), sequences)
            step = model.make_run(position + 1, batch, plan)
            execute(executor, step)
            logits = device.native.logits(step).astype(np.float64)
            top = logits.max(axis=1, keepdims=True)
            total = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
            log_probs.append(logits[np.arange(count), passages[:, position + 1]] - total)
            choices.append(logits.argmax(axis=1))
    finally:
        executor.stop()
    return Score(np.concatenate(log_probs), np.concatenate(choices), model.weight_bytes)


def rows_of(scores: dict[str, Score]) -> list[Row]:
    """Return one row for each kind of numbers, compared with the first."""
    first = next(iter(scores.values()))
    rows = []
    for name, one in scores.items():
        loss = first.log_probs - one.log_probs
        rows.append(
            {
                "numbers": name,
                "perplexity": one.perplexity,
                "change": math.expm1(float(loss.mean())),
                "error": float(loss.std()) / math.sqrt(loss.size),
                "agreement": float((one.choices == first.choices).mean()),
                "weights": one.weight_bytes / (1 << 20),
            }
        )
    return rows
