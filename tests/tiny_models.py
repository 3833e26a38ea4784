"""Tiny random checkpoints of every family, by transformers; used by all folders of tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from flowprefill.models.checkpoint import open_checkpoint

CONFIGS: dict[str, type[transformers.PretrainedConfig]] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "phi3": transformers.Phi3Config,
    "glm": transformers.GlmConfig,
    "glm4": transformers.Glm4Config,
    "olmo2": transformers.Olmo2Config,
    "granite": transformers.GraniteConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "mixtral": transformers.MixtralConfig,
    "olmoe": transformers.OlmoeConfig,
}


# Of a checkpoint that engines serve: with a tokenizer, so with its vocabulary.
SERVED = {
    "vocab_size": 49_152, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 16_384, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMAS = ("llama", "mistral", "qwen2", "qwen3")  # whose layers are those of a Llama


def tiny_model(
    family: str, *, spread: float = 0.12, rounds: bool = False, **settings: Any
) -> transformers.PreTrainedModel:
    """Random weights, biases and norms (around 1) included, float32; always the same.

    Args:
        spread: standard deviation of the weights.
        rounds: to bf16, so that all devices compute with the same weights.
    """
    config = CONFIGS[family](**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(11)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name
            mean = is_norm and not family.startswith("gemma")  # which stores a norm's weight less 1
            # So wide that an expert which rounding exchanges for another has little weight.
            of_router = 6 * spread if name.endswith("mlp.gate.weight") else spread
            values = torch.randn(parameter.shape) * (0.3 if is_norm else of_router) + mean
            parameter.copy_(values.bfloat16().float() if rounds else values)
    evaluated: transformers.PreTrainedModel = model.eval()
    return evaluated


def save_with_tokenizer(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Save a model as a checkpoint that an engine can open: with the default model's tokenizer."""
    model.save_pretrained(folder)
    open_checkpoint("smollm2-135m").tokenizer._inner.save(str(folder / "tokenizer.json"))
