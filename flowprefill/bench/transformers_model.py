"""The model in transformers, from the same weights, for comparison; used by `bench prefill`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flowprefill.errors import ConfigError
from flowprefill.models.checkpoint import Checkpoint, open_checkpoint
from flowprefill.models.model_config import ModelConfig
from flowprefill.models.weight_names import hf_name

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
}


class TransformersModel:
    """A decoder in torch eager mode, as users of transformers run it; no torch.compile."""

    def __init__(self, source: str | Path, dtype: str, threads: int) -> None:
        """Load the weights that the engine would load.

        Args:
            source: as for the engine.
            dtype: ``bf16`` or ``f32``.
            threads: what torch computes with.

        Raises:
            ConfigError: this comparison does not know the model's family or rope scaling.
        """
        self._threads = threads
        checkpoint = open_checkpoint(source)
        self._model = empty_model(checkpoint.config, DTYPES[dtype])
        _load(self._model, checkpoint)
        self._model.eval()

    @property
    def inner(self) -> Any:
        """The model itself."""
        return self._model

    def prefill_s(self, ids: list[int], attention: str) -> float:
        """Prefill one prompt into a fresh cache, logits of its last token only; seconds it took.

        Args:
            attention: transformers' name of the implementation: ``eager`` or ``sdpa``.
        """
        self._model.set_attn_implementation(attention)
        prompt = torch.tensor([ids])
        with torch.inference_mode(), _threads(self._threads):
            start_s = time.perf_counter()
            output = self._model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            int(output.logits[0, -1].argmax())
            return time.perf_counter() - start_s


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def empty_model(config: ModelConfig, dtype: torch.dtype) -> Any:
    """Build the model with random weights in one element type from the start.

    Its rotary tables are computed, in float, not loaded.
    """
    import transformers

    if config.rope_scaling.kind != "default" or config.rope_freq_factors:
        kind = config.rope_scaling.kind
        raise ConfigError(f"rope_scaling: got {kind!r}, expected 'default' for this comparison")
    if config.family not in CONFIGS:
        known = ", ".join(CONFIGS)
        raise ConfigError(f"model: got family {config.family}, expected one of {known} here")
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": None,
    }
    if config.family in ("llama", "qwen3"):
        values["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        values["mlp_bias"] = config.mlp_bias
    if config.family == "mistral":
        values["sliding_window"] = config.sliding_window or None
    made = getattr(transformers, CONFIGS[config.family])(**values)
    auto_class: Any = transformers.AutoModelForCausalLM
    return auto_class.from_config(made, dtype=dtype)


def _load(model: Any, checkpoint: Checkpoint) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in checkpoint.weights():
            parameters.pop(hf_name(name)).copy_(tensor)
    if parameters:
        raise ConfigError(f"model: transformers has weights of its own: {sorted(parameters)[:3]}")
