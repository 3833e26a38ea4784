"""Configurations of every family against transformers, and refusals of those unlike a Llama."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_damaged_configuration import VALUES
from tiny_models import CONFIGS, LLAMAS

from flowprefill.errors import CheckpointError
from flowprefill.models.families import build_graph, family_of, read_config
from flowprefill.models.graph import ModelGraph
from flowprefill.models.rope import rotate_half_rows
from flowprefill.models.weight_names import hf_name

NEWER = [family for family in CONFIGS if family not in LLAMAS]
SILENT = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}


# Of mixtures, whose experts are whole blocks of a product; a Mixtral has 8 heads of keys.
SIZES = {
    "mixtral": {"intermediate_size": 64, "num_attention_heads": 8},
    "olmoe": {"intermediate_size": 64},
}


def silent(family: str, **values: Any) -> dict[str, Any]:
    """Return a config.json that leaves all else to the family's defaults."""
    return SILENT | SIZES.get(family, {}) | {"model_type": family} | values


@pytest.mark.parametrize("family", CONFIGS)
def test_absent_keys_get_the_defaults_of_the_family(family: str) -> None:
    heads = CONFIGS[family]().num_attention_heads
    sizes = {"num_attention_heads": heads, "hidden_size": 16 * heads}
    ours, theirs = read_config(silent(family, **sizes)), CONFIGS[family](**(SILENT | sizes))
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.rms_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings is theirs.tie_word_embeddings
    assert ours.qkv_bias is getattr(theirs, "attention_bias", family == "qwen2")
    part = theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert ours.rotary_dim == int(ours.head_dim * part)
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or 0)
    if family not in LLAMAS:
        kinds = getattr(theirs, "layer_types", None) or ["full_attention"] * 8
        assert ours.sliding_layers == tuple(kind == "sliding_attention" for kind in kinds)
    if family != "gemma3_text":  # which has one for each kind of layer
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("family", NEWER)
def test_what_transformers_writes_is_what_was_meant(family: str) -> None:
    settings = SILENT | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 99}
    settings |= SIZES.get(family, {})
    ours = read_config(CONFIGS[family](**settings).to_dict())
    assert (ours.family, ours.num_kv_heads, ours.head_dim, ours.max_position) == (family, 2, 8, 99)


def test_gemma2_reads_caps_and_scales() -> None:
    ours = read_config(silent("gemma2", query_pre_attn_scalar=16))
    assert (ours.score_softcap, ours.logit_softcap) == (50.0, 30.0)
    assert (ours.embed_scale, ours.attention_scale, ours.norm_offset) == (8.0, 0.25, 1.0)
    off = silent("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (read_config(off).score_softcap, read_config(off).logit_softcap) == (0.0, 0.0)
    assert read_config(silent("gemma2", sliding_window=None)).sliding_window == 0


def test_gemma3_reads_both_forms_of_rotary_parameters_alike() -> None:
    old = silent(
        "gemma3_text", rope_theta=5e5, rope_local_base_freq=2e4, sliding_window_pattern=3,
        rope_scaling={"rope_type": "linear", "factor": 8.0}, max_position_embeddings=1000,
    )  # fmt: skip
    theirs = transformers.Gemma3TextConfig(**{k: v for k, v in old.items() if k != "model_type"})
    ours = read_config(old)
    assert ours == read_config(theirs.to_dict() | {"bos_token_id": None, "eos_token_id": None})
    assert (ours.rope_theta, ours.local_rope_theta, ours.rope_scaling.factor) == (5e5, 2e4, 8.0)
    assert ours.max_position == 1000, "the scaling is in it already"
    assert ours.sliding_layers == (True, True, False, True, True, False, True, True)


def test_granite_reads_its_factors() -> None:
    ours = read_config(
        silent("granite", embedding_multiplier=12.0, attention_multiplier=0.0625,
               residual_multiplier=0.22, logits_scaling=8.0)
    )  # fmt: skip
    assert (ours.embed_scale, ours.attention_scale) == (12.0, 0.0625)
    assert (ours.residual_scale, ours.logit_scale) == (0.22, 0.125)


def operators(graph: ModelGraph, layer: int) -> list[str]:
    return [operator.name for operator in graph.operators if operator.layer == layer]


def test_only_what_a_family_has_is_in_its_graph() -> None:
    llama = operators(build_graph(read_config(silent("llama"))), 0)
    assert llama == ["attn_norm", "qkv_proj", "rope", "attention", "o_proj",
                     "mlp_norm", "gate_up_proj", "down_proj"]  # fmt: skip
    olmo = build_graph(read_config(silent("olmo2")))
    assert operators(olmo, 7) == ["attn_round", "qkv_proj", "rope", "attention", "o_proj",
                                  "o_residual", "mlp_round", "gate_up_proj", "down_proj",
                                  "down_residual"]  # fmt: skip
    assert olmo.sources()["layers.0.q_norm"] == (64,)
    phi = build_graph(read_config(silent("phi3"))).sources()
    assert phi["layers.0.qkv"] == (3 * 64, 64)
    assert phi["layers.0.gate_up"] == (80, 64)
    assert "layers.0.q" not in phi


def test_a_mixture_has_its_experts_in_the_graph() -> None:
    values = silent(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        mlp_only_layers=[1, 5], decoder_sparse_step=2,
    )  # fmt: skip
    config = read_config(values)
    assert config.expert_layers == (False, False, False, True, False, False, False, True)
    graph = build_graph(config)
    assert operators(graph, 0)[-3:] == ["mlp_norm", "gate_up_proj", "down_proj"]
    assert operators(graph, 3)[-5:] == ["mlp_norm", "router", "route", "expert_gate_up",
                                        "expert_down"]  # fmt: skip
    sources = graph.sources()
    assert sources["layers.3.router"] == (4, 64)
    assert sources["layers.3.expert_up.3"] == (32, 64)
    assert sources["layers.3.expert_down.0"] == (64, 32)
    (weight,) = (one for one in graph.weights if one.name == "layers.3.expert_gate_up")
    assert [part.source for part in weight.parts[3:5]] == [
        "layers.3.expert_gate.3", "layers.3.expert_up.0",
    ]  # fmt: skip
    assert hf_name("layers.3.expert_up.3") == "model.layers.3.mlp.experts.3.up_proj.weight"
    by_old_name = read_config(values | {"num_experts": None, "num_local_experts": 4})
    assert by_old_name == config


def test_glm_rows_turn_as_halves() -> None:
    rows = torch.arange(2 * 8).reshape(16, 1)
    wanted = [0, 2, 1, 3, 4, 5, 6, 7]
    turned = rotate_half_rows(rows, 2, 4).flatten().tolist()
    assert turned == wanted + [8 + row for row in wanted]
    config = read_config(silent("glm4", head_dim=8))
    arrange = family_of(config).arrange
    assert arrange(config, "layers.0.q_bias", torch.arange(32))[:8].tolist() == wanted
    assert arrange(config, "layers.0.v", rows) is rows


@pytest.mark.parametrize(
    ("family", "values", "names"),
    [
        ("llama", {"is_causal": False}, ["is_causal", "False", "true"]),
        ("gemma2", {"is_causal": False}, ["is_causal", "False", "true"]),
        ("gemma2", {"hidden_activation": "gelu"}, ["hidden_activation", "gelu_pytorch_tanh"]),
        ("gemma2", {"attn_logit_softcapping": -1.0}, ["score_softcap", "-1.0", ">= 0"]),
        ("gemma2", {"attn_logit_softcapping": "50"}, ["attn_logit_softcapping", "'50'"]),
        ("gemma2", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar", "0", "> 0"]),
        ("gemma2", {"hidden_size": -4}, ["hidden_size", "-4"]),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": [1]}}, ["sliding_attention"]),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gemma3_text", {"attn_logit_softcapping": 2.0}, ["attn_logit_softcapping", "2.0", "null"]),
        ("gemma3_text", {"layer_types": ["full_attention"]}, ["layer_types", "8 entries"]),
        ("gemma3_text", {"layer_types": ["linear"]}, ["layer_types", "sliding_attention"]),
        ("gemma3_text", {"sliding_window_pattern": 0}, ["sliding_window_pattern", "0"]),
        ("gemma3_text",
         {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
         ["rope_parameters.sliding_attention", "yarn"]),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, ["long_factor", "None"]),
        ("phi3",
         {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
         ["rope factors", "8 numbers"]),
        ("phi3",
         {"sliding_window": 9, "layer_types": ["sliding_attention"] * 7 + ["full_attention"]},
         ["layer_types", "every layer of a phi3"]),
        ("phi3", {"partial_rotary_factor": 0.2}, ["rotary_dim", "even"]),
        ("phi3", {"partial_rotary_factor": 0.0}, ["partial_rotary_factor", "0.0"]),
        ("phi3", {"partial_rotary_factor": float("nan")}, ["partial_rotary_factor", "nan"]),
        ("phi3", {"partial_rotary_factor": 1.5}, ["partial_rotary_factor", "1.5", "16"]),
        ("glm4", {"architectures": ["ChatGLMModel"]}, ["architectures", "Glm4ForCausalLM"]),
        ("olmo2", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "1.0"]),
        ("granite", {"logits_scaling": 0}, ["logits_scaling", "> 0"]),
        ("granite", {"attention_multiplier": 0.0}, ["attention_multiplier", "0.0", "> 0"]),
        ("granite", {"residual_multiplier": -0.2}, ["residual_scale", "-0.2"]),
        ("qwen3_moe", {"moe_intermediate_size": 40}, ["expert_size", "40", "multiple of 32"]),
        ("qwen3_moe", {"hidden_size": 96}, ["hidden_size", "96", "multiple of 64"]),
        ("qwen3_moe", {"num_experts_per_tok": 129}, ["num_experts_per_tok", "129", "1..128"]),
        ("qwen3_moe", {"num_experts": 10**6}, ["num_experts", "1000000", "1..4096"]),
        ("qwen3_moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step", "0"]),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, ["mlp_only_layers", "'1'"]),
        ("olmoe", {"clip_qkv": 8.0}, ["clip_qkv", "8.0", "null"]),
        ("mixtral", {"num_local_experts": -1}, ["num_experts", "-1"]),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(
    family: str, values: dict[str, Any], names: list[str]
) -> None:
    if family == "phi3":
        values = {"head_dim": 16} | values
    with pytest.raises(CheckpointError) as caught:
        read_config(silent(family, **values))
    for name in names:
        assert name in caught.value.message


def test_the_example_of_the_documentation_reads_a_config() -> None:
    text = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {})
    config = read_config(silent("mine", residual_multiplier=0.5))
    assert config.residual_scale == 0.5
    stored = {hf_name(name, family_of(config).hf_names) for name in build_graph(config).sources()}
    assert "model.layers.7.pre_mlp_norm.weight" in stored
    assert "model.layers.7.input_layernorm.weight" in stored


FIELDS = [
    *SILENT, "model_type", "architectures", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "max_position_embeddings", "original_max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "rope_local_base_freq", "partial_rotary_factor", "sliding_window",
    "sliding_window_pattern", "layer_types", "hidden_act", "hidden_activation", "attention_bias",
    "mlp_bias", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "use_bidirectional_attention", "is_causal", "embedding_multiplier", "residual_multiplier",
    "attention_multiplier", "logits_scaling", "tie_word_embeddings",
]  # fmt: skip
ODD: list[Any] = [
    *VALUES, {"sliding_attention": 7}, {"full_attention": [1]}, {"full_attention": {"factor": "x"}},
    {"rope_type": "linear", "factor": 1e308},
    {"rope_type": "longrope", "factor": 2, "short_factor": [10**400], "long_factor": [1.0]},
    {"rope_type": "longrope", "factor": 2, "short_factor": [1.0] * 8, "long_factor": [1e-320] * 8,
     "original_max_position_embeddings": 1},
]  # fmt: skip


@pytest.mark.parametrize("family", NEWER)
def test_any_value_of_any_field_is_read_or_refused_by_name(family: str) -> None:
    read = 0
    for field in FIELDS:
        for value in ODD:
            values = silent(family) | {"num_hidden_layers": 2} | {field: value}
            with contextlib.suppress(CheckpointError):
                build_graph(read_config(values))
                read += 1
    assert read > len(FIELDS), "a null at least is an absent key"
