"""Canonical weight names of a decoder, and what Hugging Face and GGUF call them.

Read by the checkpoint readers; families name the weights of their graphs by the canonical
names, and say where Hugging Face calls theirs otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# canonical name inside a layer -> (Hugging Face, GGUF), both without their layer prefix. Weights
# of experts have the expert's number behind the canonical name, and at {} in the others.
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
    "router": ("mlp.gate.weight", "ffn_gate_inp.weight"),
    "expert_gate": ("mlp.experts.{}.gate_proj.weight", "ffn_gate_exps.weight[{}]"),
    "expert_up": ("mlp.experts.{}.up_proj.weight", "ffn_up_exps.weight[{}]"),
    "expert_down": ("mlp.experts.{}.down_proj.weight", "ffn_down_exps.weight[{}]"),
    "gate_bias": ("mlp.gate_proj.bias", "ffn_gate.bias"),
    "up_bias": ("mlp.up_proj.bias", "ffn_up.bias"),
    "down_bias": ("mlp.down_proj.bias", "ffn_down.bias"),
}
# Of weights that have no common name at Hugging Face: families say theirs.
_GGUF_NAMES = {
    "attn_post_norm": "post_attention_norm.weight",
    "mlp_post_norm": "post_ffw_norm.weight",
}
MODEL_NAMES = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm": ("model.norm.weight", "output_norm.weight"),
    "lm_head": ("lm_head.weight", "output.weight"),
}


def hf_name(canonical: str, names: Mapping[str, str] = MappingProxyType({})) -> str:
    """Name of a canonical weight in a Hugging Face checkpoint; ``names``: Family.hf_names."""
    if canonical in MODEL_NAMES:
        return MODEL_NAMES[canonical][0]
    _, layer, name, *expert = canonical.split(".")
    inside = names[name] if name in names else LAYER_NAMES[name][0]
    return f"model.layers.{layer}.{inside.format(*expert)}"


def gguf_name(canonical: str) -> str:
    """Name of a canonical weight in a GGUF file."""
    if canonical in MODEL_NAMES:
        return MODEL_NAMES[canonical][1]
    _, layer, name, *expert = canonical.split(".")
    inside = _GGUF_NAMES[name] if name in _GGUF_NAMES else LAYER_NAMES[name][1]
    return f"blk.{layer}.{inside.format(*expert)}"
