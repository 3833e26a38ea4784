"""Granite: a Llama whose embeddings, scores, residuals and logits have factors of their own."""

from __future__ import annotations

from flowprefill.models.families.family import Family
from flowprefill.models.hf_config import HfConfig, read_decoder
from flowprefill.models.model_config import ModelConfig


def read_granite(values: HfConfig) -> ModelConfig:
    """Read a config.json of a Granite 3 dense model."""
    has_bias = values.flag("attention_bias")
    return read_decoder(
        values, max_position=2048, qkv_bias=has_bias, o_bias=has_bias,
        mlp_bias=values.flag("mlp_bias"),
        embed_scale=values.number("embedding_multiplier", 1.0),
        residual_scale=values.number("residual_multiplier", 1.0),
        attention_scale=values.positive("attention_multiplier", 1.0),
        logit_scale=1.0 / values.positive("logits_scaling", 1.0),
    )  # fmt: skip


FAMILIES = (Family(model_type="granite", architecture="GraniteForCausalLM", read=read_granite),)
