"""Mixtures of experts, Qwen3-MoE, Mixtral and OLMoE: several MLPs a layer, each row has a few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowprefill.models.families.family import Family, GgufForm
from flowprefill.models.hf_config import HfConfig, read_decoder
from flowprefill.models.model_config import ModelConfig, bad_field, checked_layers

if TYPE_CHECKING:
    from flowprefill.models.gguf_metadata import GgufMetadata

# Keys of GGUF files whose mixtures are computed otherwise.
_REFUSED = ("expert_shared_count", "expert_group_count", "leading_dense_block_count")
_SOFTMAX = 1  # expert_gating_func


def _experts(values: HfConfig, count: int, per_token: int, size: int) -> dict[str, Any]:
    """Read how many there are, by whichever name; the arguments: where a file is silent."""
    of_others = values.integer("num_local_experts", count)
    return {
        "num_experts": values.integer("num_experts", of_others),
        "experts_per_token": values.integer("num_experts_per_tok", per_token),
        "expert_size": size,
    }


def _expert_layers(values: HfConfig, experts: int) -> tuple[bool, ...]:
    """Return which layers of a Qwen3-MoE have experts."""
    dense = values.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise bad_field("mlp_only_layers", dense, "a list of layers")
    step = values.integer("decoder_sparse_step", 1)
    if step < 1:
        raise bad_field("decoder_sparse_step", step, "an integer >= 1")
    layers = checked_layers("num_hidden_layers", values.integer("num_hidden_layers"))
    return tuple(
        experts > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(layers)
    )


def read_qwen3_moe(values: HfConfig) -> ModelConfig:
    """Read a config.json of a Qwen3-MoE; its window, if it has one, holds in every layer."""
    has_bias = values.flag("attention_bias")
    experts = _experts(values, 128, 8, values.integer("moe_intermediate_size", 768))
    sliding = values.sliding_everywhere(4096) if values.flag("use_sliding_window") else {}
    return read_decoder(
        values, max_position=32_768, kv_heads=4, qk_norm=True, qkv_bias=has_bias, o_bias=has_bias,
        norm_experts=values.flag("norm_topk_prob"),
        expert_layers=_expert_layers(values, experts["num_experts"]), **experts, **sliding,
    )  # fmt: skip


def read_mixtral(values: HfConfig) -> ModelConfig:
    """Read a config.json of a Mixtral; its window, if it has one, holds in every layer."""
    size = values.integer("intermediate_size")
    return read_decoder(
        values, max_position=131_072, kv_heads=8, rms_eps=1e-5, theta=1e6, norm_experts=True,
        **_experts(values, 8, 2, size), **values.sliding_everywhere(),
    )  # fmt: skip


def read_olmoe(values: HfConfig) -> ModelConfig:
    """Read a config.json of an OLMoE."""
    if values.values.get("clip_qkv") is not None:
        raise bad_field("clip_qkv", values.values["clip_qkv"], "null: queries are not clipped")
    has_bias = values.flag("attention_bias")
    size = values.integer("intermediate_size")
    return read_decoder(
        values, max_position=4096, rms_eps=1e-5, qkv_bias=has_bias, o_bias=has_bias,
        qk_norm=True, qk_norm_over_heads=True, norm_experts=values.flag("norm_topk_prob"),
        **_experts(values, 64, 8, size),
    )  # fmt: skip


def read_gguf_experts(
    metadata: GgufMetadata, architecture: str, default_size: int
) -> dict[str, Any]:
    """Read ModelConfig's fields about experts; empty: the file has none.

    Args:
        default_size: intermediate size of an expert where the file does not say.

    Raises:
        CheckpointError: a key says that they are computed otherwise.
    """

    def integer(key: str, default: int | None = None) -> int:
        return int(metadata.get(f"{architecture}.{key}", int, default))

    count = integer("expert_count", 0)
    if not count:
        return {}
    for key in (f"{architecture}.{key}" for key in _REFUSED):
        if metadata.values.get(key):
            raise bad_field(key, metadata.values[key], "0")
    if (gating := integer("expert_gating_func", _SOFTMAX)) not in (0, _SOFTMAX):
        raise bad_field(f"{architecture}.expert_gating_func", gating, "1: softmax")
    scale = float(metadata.get(f"{architecture}.expert_weights_scale", (float, int), 1.0))
    if scale not in (0.0, 1.0):
        raise bad_field(f"{architecture}.expert_weights_scale", scale, "1")
    return {
        "num_experts": count,
        "experts_per_token": integer("expert_used_count"),
        "expert_size": integer("expert_feed_forward_length", default_size),
    }


def _gguf(architecture: str, **more: bool) -> GgufForm:
    """Return the form of files whose header says nothing of what the architecture implies."""

    def read(metadata: GgufMetadata, fields: Mapping[str, Any]) -> dict[str, Any]:
        key = f"{architecture}.attention.sliding_window"
        if window := metadata.get(key, int, 0):
            raise bad_field(key, window, "0")
        return more | read_gguf_experts(metadata, architecture, fields["intermediate_size"])

    return GgufForm(architecture=architecture, read=read, has_experts=True)


FAMILIES = (
    Family(
        model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", read=read_qwen3_moe,
        gguf=_gguf("qwen3moe", qk_norm=True, norm_experts=True),
    ),
    Family(
        model_type="mixtral", architecture="MixtralForCausalLM", read=read_mixtral,
        hf_names={
            "router": "block_sparse_moe.gate.weight",
            "expert_gate": "block_sparse_moe.experts.{}.w1.weight",
            "expert_up": "block_sparse_moe.experts.{}.w3.weight",
            "expert_down": "block_sparse_moe.experts.{}.w2.weight",
        },
    ),
    Family(
        model_type="olmoe", architecture="OlmoeForCausalLM", read=read_olmoe,
        gguf=_gguf("olmoe", qk_norm=True, qk_norm_over_heads=True),
    ),
)  # fmt: skip
