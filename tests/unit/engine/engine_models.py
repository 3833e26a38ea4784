"""A tiny Llama with the default model's tokenizer, engines on it, and what their tests share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from flowprefill import Engine, EngineConfig, Request, SamplingParams
from flowprefill.models.checkpoint import open_checkpoint

VOCAB = 49_152
POISON = 7  # the token whose embedding is NaN in poisoned models
WAIT_S = 60.0


def save_tiny(folder: Path, *, is_poisoned: bool = False) -> transformers.PreTrainedModel:
    """Save random weights and the tokenizer; returns the model for reference logits."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=16_384,
        bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(3)
    make: Any = transformers.AutoModelForCausalLM.from_config
    model = make(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + ("norm" in name))
        if is_poisoned:
            model.get_input_embeddings().weight[POISON] = float("nan")
    model.save_pretrained(folder)
    open_checkpoint("smollm2-135m").tokenizer._inner.save(str(folder / "tokenizer.json"))
    evaluated: transformers.PreTrainedModel = model.eval()
    return evaluated


def make_engine(folder: Path, **settings: Any) -> Engine:
    """An uncalibrated float32 engine of one thread unless told otherwise."""
    defaults: dict[str, Any] = {
        "calibrate": False,
        "dtype": "f32",
        "threads": 1,
        "kv_cache_gib": 0.02,
    }
    return Engine(folder, EngineConfig(**(defaults | settings)))


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    """Random ordinary token ids; never special ones or POISON."""
    return [int(i) for i in np.random.default_rng(seed).integers(100, VOCAB, tokens)]


def greedy(max_tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **params)


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
    """Founding invariant 3: no request, no block, no workspace is left."""
    wait_for(lambda: engine.stats().workspace_bytes == 0, "every workspace free")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.suspended) == (0, 0, 0)
    assert stats.kv_blocks_used == 0
    engine._pool.check()
    assert not engine._core._runs
    assert not engine._core._live
