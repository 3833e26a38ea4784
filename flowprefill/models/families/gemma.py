"""Gemma 2 and the text models of Gemma 3: norms before and after, GeGLU, scaled embeddings.

Gemma 2 caps scores and logits; Gemma 3 has norms of q and k, and another rotary base in layers with
a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flowprefill.models.families.family import Family, GgufForm
from flowprefill.models.hf_config import HfConfig, read_decoder
from flowprefill.models.model_config import ModelConfig, bad_field

if TYPE_CHECKING:
    from flowprefill.models.gguf_metadata import GgufMetadata

_NAMES = {
    "attn_post_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}


def _read(values: HfConfig, pattern: int, **fields: Any) -> ModelConfig:
    """Read what both have; ``pattern``: every so many layers one sees all tokens."""
    if values.flag("use_bidirectional_attention"):
        raise bad_field("use_bidirectional_attention", True, "false: a model that writes text")
    has_bias = values.flag("attention_bias")
    common: dict[str, Any] = {
        "head_dim": 256,
        "kv_heads": 4,
        "tied": True,
        "qkv_bias": has_bias,
        "o_bias": has_bias,
        "activation": values.activation("hidden_activation", "gelu_pytorch_tanh"),
        "post_norms": True,
        "norm_offset": 1.0,
        "embed_scale": max(values.integer("hidden_size"), 1) ** 0.5,
        "attention_scale": values.positive("query_pre_attn_scalar", 256.0) ** -0.5,
    }
    sliding = values.sliding(4096, lambda layer: (layer + 1) % pattern != 0)
    return read_decoder(values, **(common | sliding | fields))


def read_gemma2(values: HfConfig) -> ModelConfig:
    """Read a config.json of a Gemma 2; a null softcap is none."""
    caps = {"score_softcap": ("attn_logit_softcapping", 50.0),
            "logit_softcap": ("final_logit_softcapping", 30.0)}  # fmt: skip
    fields = {
        field: values.number(name, 0.0 if name in values.values else default)
        for field, (name, default) in caps.items()
    }
    return _read(values, pattern=2, max_position=8192, **fields)


def read_gemma3(values: HfConfig) -> ModelConfig:
    """Read a config.json of a Gemma 3 text model, with rotary parameters in the old or new form."""
    if values.number("attn_logit_softcapping", 0.0):  # which transformers reads past
        cap = values.values["attn_logit_softcapping"]
        raise bad_field("attn_logit_softcapping", cap, "null: scores of a gemma3_text have no cap")
    pattern = values.integer("sliding_window_pattern", 6)
    if pattern < 1:
        raise bad_field("sliding_window_pattern", pattern, "an integer >= 1")
    by_kind = HfConfig(values.mapping("rope_parameters"))
    local = by_kind.mapping("sliding_attention")
    if local.get("rope_type", "default") != "default":
        raise bad_field("rope_parameters.sliding_attention", local, "rope_type 'default'")
    full = by_kind.mapping("full_attention") | values.mapping("rope_scaling")
    flat = dict(values.values) | {"rope_parameters": full, "rope_scaling": None}
    local_theta = HfConfig(local).number(
        "rope_theta", values.number("rope_local_base_freq", 10_000.0)
    )
    config = _read(
        HfConfig(flat),
        pattern=pattern,
        max_position=131_072,
        theta=1e6,
        qk_norm=True,
        local_rope_theta=local_theta,
        logit_softcap=values.number("final_logit_softcapping", 0.0),
    )
    # Its files name the context that the scaling reaches.
    return replace(config, max_position=values.integer("max_position_embeddings", 131_072))


def _read_gguf(
    metadata: GgufMetadata, fields: Mapping[str, Any], prefix: str, pattern: int, large: int
) -> dict[str, Any]:
    """Read what the headers of both have; the norms' weights are whole in these files.

    Args:
        large: layers of the model whose scores are scaled by hidden_size, which no key tells.
    """
    layers, heads = fields["num_layers"], max(fields["num_heads"], 1)
    scaled_by = fields["hidden_size"] // heads if layers == large else fields["head_dim"]
    window = int(metadata.get(f"{prefix}.attention.sliding_window", int, 4096))
    return {
        "activation": "gelu_tanh",
        "post_norms": True,
        "embed_scale": max(fields["hidden_size"], 1) ** 0.5,
        "attention_scale": max(scaled_by, 1) ** -0.5,
        "sliding_window": window,
        "sliding_layers": tuple(window > 0 and (i + 1) % pattern != 0 for i in range(layers)),
        "max_position": int(metadata.get(f"{prefix}.context_length", int)),
    }


def read_gemma2_gguf(metadata: GgufMetadata, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read a Gemma 2's GGUF header."""
    caps = {"score_softcap": ("attn_logit_softcapping", 50.0),
            "logit_softcap": ("final_logit_softcapping", 30.0)}  # fmt: skip
    return _read_gguf(metadata, fields, "gemma2", pattern=2, large=46) | {
        field: metadata.get(f"gemma2.{name}", float, default)
        for field, (name, default) in caps.items()
    }


def read_gemma3_gguf(metadata: GgufMetadata, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read a Gemma 3's GGUF header."""
    key = "gemma3.attention.sliding_window_pattern"
    if metadata.values.get(key, 6) != 6:
        raise bad_field(key, metadata.values[key], "6")
    return _read_gguf(metadata, fields, "gemma3", pattern=6, large=62) | {
        "qk_norm": True,
        "local_rope_theta": metadata.get("gemma3.rope.freq_base_swa", float, 10_000.0),
        "logit_softcap": metadata.get("gemma3.final_logit_softcapping", float, 0.0),
    }


FAMILIES = (
    Family(
        model_type="gemma2", architecture="Gemma2ForCausalLM", read=read_gemma2, hf_names=_NAMES,
        gguf=GgufForm(architecture="gemma2", read=read_gemma2_gguf),
    ),
    Family(
        model_type="gemma3_text", architecture="Gemma3ForCausalLM", read=read_gemma3,
        hf_names=_NAMES, gguf=GgufForm(architecture="gemma3", read=read_gemma3_gguf),
    ),
)  # fmt: skip
