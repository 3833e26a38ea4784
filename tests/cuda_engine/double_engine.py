"""The checkpoint of these tests, its reference, and how they wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from flowprefill import Engine, Request, SamplingParams
from flowprefill.models.checkpoint import open_checkpoint

VOCAB = 512
WAIT_S = 60.0
# bf16 has 8 bits; a few layers of rounding.
TOLERANCE = 0.03

Logits = npt.NDArray[np.float32]


def save_checkpoint(folder: Path) -> None:
    """Save random weights, rounded to bf16 so that all devices compute with the same."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(5)
    make: Any = transformers.AutoModelForCausalLM.from_config
    model = make(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape) * 0.15 + ("norm" in name)
            parameter.copy_(values.bfloat16().float())
    model.save_pretrained(folder)
    open_checkpoint("smollm2-135m").tokenizer._inner.save(str(folder / "tokenizer.json"))


def reference_logits(folder: Path, ids: list[int]) -> Logits:
    """Logits at every position by transformers in float32, [tokens, vocab]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Logits = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return [int(i) for i in np.random.default_rng(seed).integers(3, VOCAB, tokens)]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def ids_of(engine: Engine, prompt: list[int], max_tokens: int) -> list[int]:
    """The greedy continuation when nothing else runs."""
    return engine.submit(Request(prompt, greedy(max_tokens))).result(WAIT_S).token_ids


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until something that must happen has happened."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"did not happen: {what}"
        time.sleep(0.001)


def assert_all_free(engine: Engine) -> None:
    """No request, no run, no block is left."""
    wait_for(lambda: not engine._core._runs, "every run ends")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.suspended) == (0, 0, 0)
    assert stats.kv_blocks_used == 0
    engine._pool.check()


class KeptLogits:
    """Keeps a copy of the logits of every run; the engine then chooses all tokens itself."""

    def __init__(self, engine: Engine) -> None:
        self.rows: list[Logits] = []
        worker: Any = engine._worker
        self._outcomes = worker.outcomes
        worker.outcomes = self._keep
        worker.limits = replace(worker.limits, chooses_tokens=False)

    def _keep(self, run: Any) -> Logits:
        logits: Logits = self._outcomes(run)
        self.rows.append(logits.copy())
        return logits
