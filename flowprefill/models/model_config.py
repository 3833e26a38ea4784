"""ModelConfig: shape and constants of one decoder model.

Made by the families (from config.json) and the GGUF reader; read by the families' graph builders
and the engine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowprefill.errors import CheckpointError, shortened
from flowprefill.models.graph import Activation
from flowprefill.models.rope import RopeScaling, inverse_frequencies

MAX_LAYERS = 4096
MAX_EXPERTS = 4096
_UNNAMED = "model config: "  # what errors begin with where the file is not known


def checked_layers(name: str, value: int) -> int:
    """Refuse a layer count that would fill the memory with names before any weight is looked at."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LAYERS:
        raise bad_field(name, value, f"an integer in 1..{MAX_LAYERS}")
    return value


def bad_field(name: str, value: Any, allowed: str) -> CheckpointError:
    """Build the error for one field of a model's configuration."""
    message = f"{_UNNAMED}{name}: got {shortened(value)}, expected {allowed}"
    return CheckpointError(message, param=name)


@contextlib.contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Have errors about the fields of a file begin with its path."""
    try:
        yield
    except CheckpointError as error:
        if str(path) in error.message:
            raise
        message = f"{path}: {error.message.removeprefix(_UNNAMED)}"
        raise CheckpointError(message, param=error.param) from None


def known_ids(ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """Return the ids that are tokens, each once: old files write -1 for "none"."""
    return tuple(token for token in dict.fromkeys(ids) if 0 <= token < vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What a decoder model is, whatever file it came from; the defaults are those of a Llama.

    Attributes:
        family: name of the family that builds its graph (models/families).
        head_dim: dimensions of one head, even; num_heads * head_dim need not be hidden_size.
        rms_eps: epsilon of every RMS norm.
        rope_theta: base of the rotary frequencies.
        rope_freq_factors: divisors of the inverse frequencies, [rotary_dim / 2], or empty.
        rotary_dim: the first so many dimensions of a head turn; 0: all.
        local_rope_theta: base in sliding layers, where nothing is scaled; 0: as in the others.
        tie_embeddings: the output projection is the embedding; then there is no ``lm_head``.
        fused_qkv: the checkpoint stores q, k and v as one tensor ``qkv``.
        fused_gate_up: it stores gate and up as one tensor ``gate_up``.
        qkv_bias: q, k and v projections have a bias.
        o_bias: the attention's output projection has a bias.
        mlp_bias: gate, up and down projections have a bias.
        activation: of the gate.
        pre_norms: an RMS norm before attention and before the MLP.
        post_norms: an RMS norm after each, before it is added to the residual stream.
        qk_norm: RMS norm of q and k before the rotary embedding, one for each head.
        qk_norm_over_heads: that norm is one over all heads of a row.
        norm_offset: added to the stored weights of all norms.
        embed_scale: factor on the embeddings.
        residual_scale: factor on what attention and MLP add to the residual stream.
        attention_scale: factor on the scores; 0: head_dim ** -0.5.
        score_softcap: scores become cap * tanh(score / cap); 0: they do not.
        logit_scale: factor on the logits.
        logit_softcap: as score_softcap, of the scaled logits.
        sliding_window: tokens that a token of a sliding layer sees, itself included; 0 is none.
        sliding_layers: per layer, whether the window holds there; [num_layers].
        num_experts: of a mixture: MLPs of which each row has a few; 0: none.
        experts_per_token: how many it has.
        expert_size: intermediate size of one expert.
        norm_experts: the weights of a row's experts sum to 1.
        expert_layers: per layer, whether it has experts or one MLP of ``intermediate_size``;
            [num_layers]; empty: all have, if there are any.
        max_position: longest context, tokens.
        bos_token_id: None if the model has none.
        eos_token_ids: every id that ends a text; may be empty.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope_theta: float
    max_position: int
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rope_freq_factors: tuple[float, ...] = ()
    rotary_dim: int = 0
    local_rope_theta: float = 0.0
    tie_embeddings: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float = 0.0
    score_softcap: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    sliding_window: int = 0
    sliding_layers: tuple[bool, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    norm_experts: bool = False
    expert_layers: tuple[bool, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checked_layers("num_layers", self.num_layers)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_heads",
                 "num_kv_heads", "head_dim", "max_position")  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise bad_field(name, value, "an integer >= 1")
        if self.num_heads % self.num_kv_heads:
            raise bad_field("num_kv_heads", self.num_kv_heads, f"a divisor of {self.num_heads}")
        if self.head_dim % 2:
            raise bad_field("head_dim", self.head_dim, "an even number")
        self._check_numbers()
        self._check_rotary()
        self._check_sliding()
        self._check_experts()

    def _check_numbers(self) -> None:
        for name in ("rms_eps", "rope_theta", "embed_scale", "residual_scale", "logit_scale"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise bad_field(name, value, "a number > 0")
        for name in ("attention_scale", "score_softcap", "logit_softcap", "local_rope_theta"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise bad_field(name, value, "a number >= 0")
        if not self.attention_scale:
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)

    def _check_rotary(self) -> None:
        if self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise bad_field("rope_theta", self.rope_theta, "a number > 1 with yarn")
        if not self.rotary_dim:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise bad_field("rotary_dim", self.rotary_dim, f"an even number up to {self.head_dim}")
        half = self.rotary_dim // 2
        for factors in (self.rope_freq_factors, *self.rope_scaling.factor_lists()):
            if factors and len(factors) != half:
                raise bad_field("rope factors", factors, f"{half} numbers")

    def _check_sliding(self) -> None:
        if not self.sliding_layers:
            object.__setattr__(self, "sliding_layers", (False,) * self.num_layers)
        if len(self.sliding_layers) != self.num_layers:
            raise bad_field("layer_types", self.sliding_layers, f"{self.num_layers} entries")
        if self.sliding_window < 0 or (any(self.sliding_layers) and not self.sliding_window):
            raise bad_field("sliding_window", self.sliding_window, "an integer >= 1")

    def _check_experts(self) -> None:
        if not self.expert_layers:
            object.__setattr__(self, "expert_layers", (self.num_experts > 0,) * self.num_layers)
        if len(self.expert_layers) != self.num_layers:
            raise bad_field("expert_layers", self.expert_layers, f"{self.num_layers} entries")
        least = 1 if any(self.expert_layers) else 0
        if not least <= self.num_experts <= MAX_EXPERTS:
            allowed = f"an integer in {least}..{MAX_EXPERTS}"
            raise bad_field("num_experts", self.num_experts, allowed)
        if not least:
            return
        if not 1 <= self.experts_per_token <= self.num_experts:
            allowed = f"an integer in 1..{self.num_experts}"
            raise bad_field("num_experts_per_tok", self.experts_per_token, allowed)
        for name, value, unit in (
            ("expert_size", self.expert_size, 32), ("hidden_size", self.hidden_size, 64),
        ):  # fmt: skip
            if value < 1 or value % unit:
                raise bad_field(name, value, f"a multiple of {unit} in a mixture of experts")


def rope_inverse_frequencies(config: ModelConfig) -> tuple[npt.NDArray[np.float32], float]:
    """Give the native model its rotary frequencies; all scaling is in them.

    Returns:
        float32 [rotary_dim / 2], radians per position of the pair (i, i + rotary_dim / 2); and the
        factor on cos and sin.
    """
    return inverse_frequencies(
        config.rotary_dim, config.rope_theta, config.rope_scaling, config.rope_freq_factors
    )
