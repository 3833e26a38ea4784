"""OLMo 2: norms after attention and MLP, none before; one norm over all heads of q, and of k."""

from __future__ import annotations

from flowprefill.models.families.family import Family
from flowprefill.models.hf_config import HfConfig, read_decoder
from flowprefill.models.model_config import ModelConfig


def read_olmo2(values: HfConfig) -> ModelConfig:
    """Read a config.json of an OLMo 2."""
    has_bias = values.flag("attention_bias")
    return read_decoder(
        values, max_position=2048, rms_eps=1e-5, qkv_bias=has_bias, o_bias=has_bias,
        pre_norms=False, post_norms=True, qk_norm=True, qk_norm_over_heads=True,
    )  # fmt: skip


FAMILIES = (
    Family(
        model_type="olmo2", architecture="Olmo2ForCausalLM", read=read_olmo2,
        hf_names={
            "attn_post_norm": "post_attention_layernorm.weight",
            "mlp_post_norm": "post_feedforward_layernorm.weight",
        },
    ),
)  # fmt: skip
