"""A model of transformers in a process of its own; `bench gpu --shape --peer transformers` asks it.

Reads works as JSON lines on stdin, ``{"how": ..., "kind": "prefill" | "decode", "tokens": N,
"sequences": N}``, and answers ``{"seconds": S}``, of a decode step the median of some, or
``{"error": ...}``. The first answer tells versions, and what attention there is.

    python -m flowprefill.bench.gpu_peer_child SHAPE LAYERS DEVICE
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from flowprefill.bench.gpu_peer import COMPILED, STEPS
from flowprefill.bench.random_model import SHAPES
from flowprefill.bench.transformers_model import empty_model
from flowprefill.models.model_config import ModelConfig

# Further ones than sdpa, by the package that each needs.
ATTENTION = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def attentions() -> list[str]:
    """Return the implementations of attention that are installed."""
    return [
        "sdpa",
        *(name for name, module in ATTENTION.items() if importlib.util.find_spec(module)),
    ]


class Peer:
    """The model on the device, with random weights in bf16."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        """Build it there."""
        self._device = torch.device(device)
        with self._device:
            self._model: Any = empty_model(config, torch.bfloat16).eval()
        self._vocab_size = config.vocab_size
        self._kv_shape = (config.num_kv_heads, config.head_dim)
        self._layers = config.num_layers
        # Called past_key_values until 5.23.
        names = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._compiled: Any = torch.compile(self._model, dynamic=False)
        # As generate() compiles a step: a CUDA graph of all of it.
        self._compiled_step: Any = torch.compile(self._model, mode="reduce-overhead")
        self._decoders: dict[tuple[str, int, int], Decoder] = {}

    def seconds(self, how: str, kind: str, tokens: int, sequences: int) -> float:
        """Measure once; the first time compiles, captures and loads kernels.

        Args:
            how: implementation of attention, and COMPILED or nothing.
            kind: prefill of one prompt of `tokens`, or decode with so many cached of each sequence.
        """
        self._model.set_attn_implementation(how.removesuffix(COMPILED))
        with torch.no_grad():
            if kind == "prefill":
                return self._prefill_s(how, tokens)
            return self._decode_s(how, tokens, sequences)

    def _prefill_s(self, how: str, tokens: int) -> float:
        """Prefill into a fresh cache, until the next token is known."""
        call = self._compiled if how.endswith(COMPILED) else self._model
        prompt = torch.randint(self._vocab_size, (1, tokens), device=self._device)
        since_s = time.perf_counter()
        int(call(input_ids=prompt, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return time.perf_counter() - since_s

    def _decode_s(self, how: str, context: int, sequences: int) -> float:
        key = (how, context, sequences)
        if key not in self._decoders:
            self._decoders.clear()  # caches of many sequences are large
            self._decoders[key] = self._decoder(*key)
        return self._decoders[key].step_s()

    def _decoder(self, how: str, context: int, sequences: int) -> Decoder:
        is_compiled = how.endswith(COMPILED)
        config, room = self._model.config, -(-(context + STEPS + 1) // 64) * 64
        cache: Any = (
            transformers.StaticCache(config=config, max_cache_len=room)
            if is_compiled
            else transformers.DynamicCache(config=config)
        )
        heads, size = self._kv_shape
        shape = (sequences, heads, context, size)
        for layer in range(self._layers):
            k, v = (torch.randn(shape, device=self._device, dtype=torch.bfloat16) for _ in range(2))
            cache.update(k, v, layer)
        call = self._compiled_step if is_compiled else self._model
        ids = torch.zeros((sequences, 1), dtype=torch.long, device=self._device)
        options = {self._cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        return Decoder(cache, context, ids, lambda ids: call(input_ids=ids, **options).logits)


class Decoder:
    """Sequences with tokens in a cache, which decode by the greedy choice."""

    def __init__(
        self,
        cache: Any,
        context: int,
        ids: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Take a filled cache.

        Args:
            ids: first token of each sequence, [sequences, 1].
            logits_of: decodes one token of each.
        """
        self._cache = cache
        self._context = context
        self._ids = ids
        self._logits_of = logits_of

    def step_s(self) -> float:
        """Return the median seconds of some steps, each until the host has its tokens."""
        took_s = []
        for _ in range(STEPS):
            since_s = time.perf_counter()
            self._ids = self._logits_of(self._ids)[:, -1].argmax(-1, keepdim=True)
            self._ids.tolist()
            took_s.append(time.perf_counter() - since_s)
        self._forget()
        return statistics.median(took_s)

    def _forget(self) -> None:
        """Take what the steps added out of the cache."""
        for layer in self._cache.layers:
            if isinstance(self._cache, transformers.StaticCache):
                layer.cumulative_length.fill_(self._context)
            else:
                layer.crop(-STEPS)


def main() -> None:
    """Answer until stdin ends; what libraries print goes to stderr."""
    shape, layers, device = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**found: Any) -> None:
        print(json.dumps(found), file=answers, flush=True)

    make = SHAPES[shape]
    peer = Peer(make(int(layers)), device)
    name = f"transformers {transformers.__version__}, torch {torch.__version__}"
    answer(name=name, attentions=attentions())
    for line in sys.stdin:
        try:
            answer(seconds=peer.seconds(**json.loads(line)))
        except Exception as error:  # what a foreign library raises is its own affair
            text = str(error).strip().partition("\n")[0]
            answer(error=f"{type(error).__name__}: {text[:200]}")


if __name__ == "__main__":
    main()
