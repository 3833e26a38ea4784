"""Llama, Mistral, Qwen2, Qwen3: RMS norm, grouped-query attention with rotary positions, SwiGLU."""

from __future__ import annotations

from flowprefill.models.graph import ModelGraph, RotaryTable, WeightPart
from flowprefill.models.model_config import ModelConfig, rope_inverse_frequencies


def build(config: ModelConfig) -> ModelGraph:
    """Return the graph; weights have the canonical names of weight_names.py."""
    frequencies, attention_factor = rope_inverse_frequencies(config)
    g = ModelGraph(
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rotary_tables=[RotaryTable(tuple(map(float, frequencies)), float(attention_factor))],
    )
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    g.tensor("hidden", hidden, extent="prompt")
    g.tensor("rotary", config.head_dim, extent="prompt")
    g.tensor("normed", hidden, "activation")
    g.tensor("qkv", q + 2 * kv, "product")
    g.tensor("q", q, "activation")
    g.tensor("context", q, "activation")
    g.tensor("gated", inner, "activation")
    g.tensor("last", hidden, "activation", extent="sequence")
    g.tensor("logits", config.vocab_size, extent="sequence")

    embed = WeightPart("embed", config.vocab_size)
    g.table("embed", hidden, embed)
    g.add("embed", "embed", output="hidden", weight="embed")
    g.add("rotary", "rotary", output="rotary", table=0)
    for layer in range(config.num_layers):
        _add_layer(g, config, layer)
    g.add(
        "norm", "final_norm", input="hidden", output="last", eps=config.rms_eps,
        weight=g.vector("final_norm", WeightPart("final_norm", hidden)),
    )  # fmt: skip
    head = embed if config.tie_embeddings else WeightPart("lm_head", config.vocab_size)
    g.add(
        "linear", "lm_head", input="last", output="logits",
        weight=g.matrix("lm_head", hidden, head),
    )  # fmt: skip
    return g


def _add_layer(g: ModelGraph, config: ModelConfig, layer: int) -> None:
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * dim, config.num_kv_heads * dim
    eps, prefix = config.rms_eps, f"layers.{layer}."

    def part(name: str, rows: int) -> WeightPart:
        return WeightPart(prefix + name, rows)

    def vector(name: str, *parts: WeightPart, wanted: bool = True, paired: bool = False) -> str:
        return g.vector(prefix + name, *parts, paired=paired) if wanted else ""

    g.add(
        "norm", "attn_norm", layer=layer, input="hidden", output="normed", eps=eps,
        weight=vector("attn_norm", part("attn_norm", hidden)),
    )  # fmt: skip
    qkv = part("q", q), part("k", kv), part("v", kv)
    g.add(
        "linear", "qkv_proj", layer=layer, input="normed", output="qkv",
        weight=g.matrix(prefix + "qkv", hidden, *qkv),
    )  # fmt: skip
    biases = part("q_bias", q), part("k_bias", kv), part("v_bias", kv)
    g.add(
        "rope", "rope", layer=layer, input="qkv", output="q", rotary="rotary", eps=eps,
        scale=dim**-0.5,
        bias=vector("qkv_bias", *biases, wanted=config.qkv_bias),
        q_norm=vector("q_norm", part("q_norm", dim), wanted=config.qk_norm),
        k_norm=vector("k_norm", part("k_norm", dim), wanted=config.qk_norm),
    )  # fmt: skip
    window = config.sliding_window if config.sliding_layers[layer] else 0
    g.add("attention", "attention", layer=layer, input="q", output="context", window=window)
    g.add(
        "linear", "o_proj", layer=layer, input="context", output="hidden", epilogue="add",
        weight=g.matrix(prefix + "o", q, part("o", hidden)),
        bias=vector("o_bias", part("o_bias", hidden), wanted=config.o_bias),
    )  # fmt: skip
    g.add(
        "norm", "mlp_norm", layer=layer, input="hidden", output="normed", eps=eps,
        weight=vector("mlp_norm", part("mlp_norm", hidden)),
    )  # fmt: skip
    gate_up = part("gate", inner), part("up", inner)
    gate_up_bias = part("gate_bias", inner), part("up_bias", inner)
    g.add(
        "linear", "gate_up_proj", layer=layer, input="normed", output="gated", epilogue="gate",
        weight=g.matrix(prefix + "gate_up", hidden, *gate_up, paired=True),
        bias=vector("gate_up_bias", *gate_up_bias, wanted=config.mlp_bias, paired=True),
    )  # fmt: skip
    g.add(
        "linear", "down_proj", layer=layer, input="gated", output="hidden", epilogue="add",
        weight=g.matrix(prefix + "down", inner, part("down", hidden)),
        bias=vector("down_bias", part("down_bias", hidden), wanted=config.mlp_bias),
    )  # fmt: skip
