"""Canonical weight names and shapes of a decoder, and what Hugging Face and GGUF call them.

Read by the checkpoint readers; the native model builder takes weights by their canonical names.
"""

from __future__ import annotations

from flowprefill.models.model_config import ModelConfig

# canonical name inside a layer -> (Hugging Face, GGUF), both without their layer prefix.
LAYER_NAMES = {
    "attn_norm": ("input_layernorm.weight", "attn_norm.weight"),
    "q": ("self_attn.q_proj.weight", "attn_q.weight"),
    "k": ("self_attn.k_proj.weight", "attn_k.weight"),
    "v": ("self_attn.v_proj.weight", "attn_v.weight"),
    "q_bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "k_bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "v_bias": ("self_attn.v_proj.bias", "attn_v.bias"),
    "q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "o": ("self_attn.o_proj.weight", "attn_output.weight"),
    "o_bias": ("self_attn.o_proj.bias", "attn_output.bias"),
    "mlp_norm": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "gate": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "up": ("mlp.up_proj.weight", "ffn_up.weight"),
    "down": ("mlp.down_proj.weight", "ffn_down.weight"),
    "gate_bias": ("mlp.gate_proj.bias", "ffn_gate.bias"),
    "up_bias": ("mlp.up_proj.bias", "ffn_up.bias"),
    "down_bias": ("mlp.down_proj.bias", "ffn_down.bias"),
}
MODEL_NAMES = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "lm_head": ("lm_head.weight", "output.weight"),
}


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's weights in the order they are used; matrices are [out, in]."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,), "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden),
    }  # fmt: skip
    if config.qkv_bias:
        shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    shapes["o"] = (hidden, q)
    if config.o_bias:
        shapes["o_bias"] = (hidden,)
    shapes |= {"mlp_norm": (hidden,), "gate": (inner, hidden), "up": (inner, hidden)}
    shapes["down"] = (hidden, inner)
    if config.mlp_bias:
        shapes |= {"gate_bias": (inner,), "up_bias": (inner,), "down_bias": (hidden,)}
    return shapes


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Give every weight the model must have, by canonical name, in the order it is streamed.

    Returns:
        ``embed``, ``layers.{i}.{name}`` for the names of layer_shapes, ``final_norm`` and, unless
        the embeddings are tied, ``lm_head``; with their shapes.
    """
    vocabulary = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"embed": vocabulary}
    of_layer = layer_shapes(config)
    for layer in range(config.num_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    shapes["final_norm"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["lm_head"] = vocabulary
    return shapes


def hf_name(canonical: str) -> str:
    """Name of a canonical weight in a Hugging Face checkpoint."""
    if canonical in MODEL_NAMES:
        return MODEL_NAMES[canonical][0]
    _, layer, name = canonical.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[name][0]}"


def gguf_name(canonical: str) -> str:
    """Name of a canonical weight in a GGUF file."""
    if canonical in MODEL_NAMES:
        return MODEL_NAMES[canonical][1]
    _, layer, name = canonical.split(".")
    return f"blk.{layer}.{LAYER_NAMES[name][1]}"
