"""Phi-3 (and Phi-3.5, Phi-4 mini): a Llama with fused projections, partial rotary and longrope."""

from __future__ import annotations

from flowprefill.models.families.family import Family
from flowprefill.models.hf_config import HfConfig, read_decoder
from flowprefill.models.model_config import ModelConfig


def read_phi3(values: HfConfig) -> ModelConfig:
    """Read a config.json of a Phi-3."""
    original = {"original_max_position_embeddings": 4096}
    return read_decoder(
        HfConfig(original | dict(values.values)), max_position=4096, rms_eps=1e-5, rotary_part=1.0,
        fused_qkv=True, fused_gate_up=True, **values.sliding_everywhere(),
    )  # fmt: skip


FAMILIES = (
    Family(
        model_type="phi3", architecture="Phi3ForCausalLM", read=read_phi3,
        hf_names={"qkv": "self_attn.qkv_proj.weight", "gate_up": "mlp.gate_up_proj.weight"},
    ),
)  # fmt: skip
