"""A model family as a user adds one: attention and MLP read the same norm, side by side.

What attention gives passes a norm of its own; both branches have a factor.
"""

from __future__ import annotations

from flowprefill.models.families import Family, register
from flowprefill.models.families.decoder import DecoderLayer, build_decoder
from flowprefill.models.graph import ModelGraph
from flowprefill.models.hf_config import HfConfig, read_decoder
from flowprefill.models.model_config import ModelConfig


class ParallelLayer(DecoderLayer):
    """One layer: the stream's norm once, then both branches."""

    def add(self) -> None:
        """Add the operators in their order."""
        self.norm_before("attn_norm")
        self.attention()
        self.gate_and_up()
        self.add_attention("attn_post_norm")
        self.add_mlp("")


def read(values: HfConfig) -> ModelConfig:
    """Read a Llama's keys and one more."""
    factor = values.number("residual_multiplier", 1.0)
    return read_decoder(values, max_position=1024, post_norms=True, residual_scale=factor)


def build(config: ModelConfig) -> ModelGraph:
    """Return the graph."""
    return build_decoder(config, ParallelLayer)


FAMILY = Family(
    model_type="parallel",
    architecture="ParallelForCausalLM",
    read=read,
    build=build,
    hf_names={"attn_norm": "norm.weight", "attn_post_norm": "self_attn.norm.weight"},
)
register(FAMILY)
