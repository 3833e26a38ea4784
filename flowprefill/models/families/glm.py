"""GLM and GLM-4 (0414): half of each head turns, neighbours together; GLM-4 has norms after too."""

from __future__ import annotations

from flowprefill.models.families.family import Family, rotate_half_heads
from flowprefill.models.hf_config import HfConfig, read_decoder
from flowprefill.models.model_config import ModelConfig

_NAMES = {"gate_up": "mlp.gate_up_proj.weight"}
_POST_NORMS = {
    "attn_post_norm": "post_self_attn_layernorm.weight",
    "mlp_post_norm": "post_mlp_layernorm.weight",
}


def read_glm(values: HfConfig) -> ModelConfig:
    """Read a config.json of a GLM."""
    return _read(values, has_post_norms=False)


def read_glm4(values: HfConfig) -> ModelConfig:
    """Read a config.json of a GLM-4."""
    return _read(values, has_post_norms=True)


def _read(values: HfConfig, has_post_norms: bool) -> ModelConfig:
    return read_decoder(
        values, max_position=131_072, head_dim=128, kv_heads=2, rms_eps=1.5625e-7,
        rotary_part=0.5, qkv_bias=values.flag("attention_bias", True), fused_gate_up=True,
        post_norms=has_post_norms,
    )  # fmt: skip


FAMILIES = (
    Family(
        model_type="glm", architecture="GlmForCausalLM", read=read_glm, hf_names=_NAMES,
        arrange=rotate_half_heads,
    ),
    Family(
        model_type="glm4", architecture="Glm4ForCausalLM", read=read_glm4,
        hf_names=_NAMES | _POST_NORMS, arrange=rotate_half_heads,
    ),
)  # fmt: skip
