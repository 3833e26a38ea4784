"""Llama, Mistral, Qwen2, Qwen3: RMS norm, grouped-query attention with rotary positions, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowprefill.models.families.family import Family, GgufForm, rotate_half_heads
from flowprefill.models.families.mixture import read_gguf_experts
from flowprefill.models.hf_config import HfConfig, read_decoder
from flowprefill.models.model_config import ModelConfig, bad_field

if TYPE_CHECKING:
    from flowprefill.models.gguf_metadata import GgufMetadata


def read_llama(values: HfConfig) -> ModelConfig:
    """Read a config.json of a Llama."""
    has_bias = values.flag("attention_bias")
    return read_decoder(
        values, max_position=2048, qkv_bias=has_bias, o_bias=has_bias,
        mlp_bias=values.flag("mlp_bias"),
    )  # fmt: skip


def read_mistral(values: HfConfig) -> ModelConfig:
    """Read a config.json of a Mistral; its window holds in every layer."""
    sliding = values.sliding_everywhere(4096)
    return read_decoder(values, max_position=131_072, kv_heads=8, **sliding)


def _qwen_sliding(values: HfConfig) -> dict[str, Any]:
    if not values.flag("use_sliding_window"):
        return {}
    first = values.integer("max_window_layers", 28)
    return values.sliding(4096, lambda layer: layer >= first)


def read_qwen2(values: HfConfig) -> ModelConfig:
    """Read a config.json of a Qwen2 or Qwen2.5."""
    sliding = _qwen_sliding(values)
    return read_decoder(values, max_position=32_768, kv_heads=32, qkv_bias=True, **sliding)


def read_qwen3(values: HfConfig) -> ModelConfig:
    """Read a config.json of a Qwen3."""
    has_bias = values.flag("attention_bias")
    return read_decoder(
        values, max_position=32_768, kv_heads=32, head_dim=128, qk_norm=True,
        qkv_bias=has_bias, o_bias=has_bias, **_qwen_sliding(values),
    )  # fmt: skip


def read_llama_gguf(metadata: GgufMetadata, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read a Llama's or Mistral's GGUF header."""
    window = int(metadata.get("llama.attention.sliding_window", int, 0))
    sliding = {"sliding_window": window, "sliding_layers": (window > 0,) * fields["num_layers"]}
    experts = read_gguf_experts(metadata, "llama", fields["intermediate_size"])
    return sliding | experts | ({"norm_experts": True} if experts else {})


def read_qwen_gguf(metadata: GgufMetadata, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read a Qwen2's or Qwen3's GGUF header."""
    key = f"{fields['family']}.attention.sliding_window"
    if window := metadata.get(key, int, 0):
        raise bad_field(key, window, "0: which layers it holds for is not in the file")
    return {"qk_norm": fields["family"] == "qwen3"}


# The converter of Llama files has rows turn as neighbours; that of Qwen leaves them.
_LLAMA_GGUF = GgufForm(
    architecture="llama", read=read_llama_gguf, arrange=rotate_half_heads, has_experts=True
)

FAMILIES = (
    Family(
        model_type="llama", architecture="LlamaForCausalLM", read=read_llama, gguf=_LLAMA_GGUF
    ),
    Family(model_type="mistral", architecture="MistralForCausalLM", read=read_mistral),
    Family(
        model_type="qwen2", architecture="Qwen2ForCausalLM", read=read_qwen2,
        gguf=GgufForm(architecture="qwen2", read=read_qwen_gguf),
    ),
    Family(
        model_type="qwen3", architecture="Qwen3ForCausalLM", read=read_qwen3,
        gguf=GgufForm(architecture="qwen3", read=read_qwen_gguf),
    ),
)  # fmt: skip
