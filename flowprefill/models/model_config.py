"""ModelConfig: shape and constants of one decoder model.

Made by the checkpoint readers, read by the native model builder and the engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from flowprefill.errors import CheckpointError, shortened
from flowprefill.models.rope import RopeScaling, as_float, inverse_frequencies

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


MAX_LAYERS = 4096


def checked_layers(name: str, value: int) -> int:
    """Refuse a layer count that would fill the memory with names before any weight is looked at."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LAYERS:
        raise bad_field(name, value, f"an integer in 1..{MAX_LAYERS}")
    return value


def bad_field(name: str, value: Any, allowed: str) -> CheckpointError:
    """Build the error for one field of a model's configuration."""
    message = f"model config: {name}: got {shortened(value)}, expected {allowed}"
    return CheckpointError(message, param=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything the native model needs to know, whatever file it came from.

    Attributes:
        family: one of FAMILIES.
        head_dim: dimensions of one head, even; num_heads * head_dim need not be hidden_size.
        rms_eps: epsilon of every RMS norm.
        rope_theta: base of the rotary frequencies.
        rope_freq_factors: divisors of the inverse frequencies, [head_dim / 2], or empty.
        tie_embeddings: the output projection is the embedding; then there is no ``lm_head``.
        qkv_bias: q, k and v projections have a bias.
        o_bias: the attention's output projection has a bias.
        mlp_bias: gate, up and down projections have a bias.
        qk_norm: RMS norm over head_dim of q and k before the rotary embedding.
        sliding_window: tokens that a token of a sliding layer sees, itself included; 0 is none.
        sliding_layers: per layer, whether the window holds there; [num_layers].
        max_position: longest context, tokens.
        bos_token_id: None if the model has none.
        eos_token_ids: every id that ends a text; may be empty.
        chat_template: jinja2 text, or None.
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
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    sliding_layers: tuple[bool, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise bad_field("family", self.family, "one of " + ", ".join(FAMILIES))
        checked_layers("num_layers", self.num_layers)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_heads",
                 "num_kv_heads", "head_dim", "max_position")  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise bad_field(name, value, "an integer >= 1")
        for name in ("rms_eps", "rope_theta"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise bad_field(name, value, "a number > 0")
        if self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise bad_field("rope_theta", self.rope_theta, "a number > 1 with yarn")
        if self.num_heads % self.num_kv_heads:
            raise bad_field("num_kv_heads", self.num_kv_heads, f"a divisor of {self.num_heads}")
        if self.head_dim % 2:
            raise bad_field("head_dim", self.head_dim, "an even number")
        if self.rope_freq_factors and len(self.rope_freq_factors) != self.head_dim // 2:
            raise bad_field(
                "rope_freq_factors", self.rope_freq_factors, f"{self.head_dim // 2} numbers"
            )
        self._check_sliding()

    def _check_sliding(self) -> None:
        if not self.sliding_layers:
            object.__setattr__(self, "sliding_layers", (False,) * self.num_layers)
        if len(self.sliding_layers) != self.num_layers:
            raise bad_field("layer_types", self.sliding_layers, f"{self.num_layers} entries")
        if self.sliding_window < 0 or (any(self.sliding_layers) and not self.sliding_window):
            raise bad_field("sliding_window", self.sliding_window, "an integer >= 1")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face ``config.json``, as transformers 4 or 5 writes it.

        Args:
            values: the parsed object; defaults of absent keys are those of the family.

        Raises:
            CheckpointError: an architecture, activation, rope kind, quantisation or value that is
                not supported; names the field, what it is and what is allowed.
        """
        family = _family(values)
        hidden_size = _integer(values, "hidden_size")
        num_layers = checked_layers("num_hidden_layers", _integer(values, "num_hidden_layers"))
        num_heads = _integer(values, "num_attention_heads")
        max_position = _integer(values, "max_position_embeddings", _MAX_POSITION[family])
        theta, scaling = _rope(values, max_position)
        window, sliding_layers = _sliding(values, family, num_layers)
        attention_bias = family in ("llama", "qwen3") and _flag(values, "attention_bias")
        head_dim = 128 if family == "qwen3" else hidden_size // max(num_heads, 1)
        return cls(
            family=family,
            vocab_size=_integer(values, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(values, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_integer(values, "num_key_value_heads", _kv_heads(values, num_heads)),
            head_dim=_integer(values, "head_dim", head_dim),
            rms_eps=_number(values, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position=max_position,
            tie_embeddings=_flag(values, "tie_word_embeddings"),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=family == "llama" and _flag(values, "mlp_bias"),
            qk_norm=family == "qwen3",
            sliding_window=window,
            sliding_layers=sliding_layers,
            bos_token_id=first_or_none(token_ids(values, "bos_token_id")),
            eos_token_ids=token_ids(values, "eos_token_id"),
        )


def rope_inverse_frequencies(config: ModelConfig) -> tuple[npt.NDArray[np.float32], float]:
    """Give the native model its rotary frequencies; all scaling is in them.

    Returns:
        float32 [head_dim / 2], radians per position of the pair (i, i + head_dim / 2); and the
        factor on cos and sin.
    """
    return inverse_frequencies(
        config.head_dim, config.rope_theta, config.rope_scaling, config.rope_freq_factors
    )


# What transformers' configuration classes assume when config.json is silent.
_MAX_POSITION = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}
_DEFAULT_THETA = 10_000.0
_DEFAULT_WINDOW = 4096


def _kv_heads(values: Mapping[str, Any], num_heads: int) -> int:
    """Default of num_key_value_heads; an explicit null always means one per head."""
    if "num_key_value_heads" in values or values["model_type"] == "llama":
        return num_heads
    return 8 if values["model_type"] == "mistral" else 32


def _family(values: Mapping[str, Any]) -> str:
    family = values.get("model_type")
    if family not in FAMILIES:
        raise bad_field("model_type", family, "one of " + ", ".join(FAMILIES))
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or (
        architectures and ARCHITECTURES[family] not in architectures
    ):
        raise bad_field("architectures", architectures, ARCHITECTURES[family])
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise bad_field("hidden_act", activation, "'silu'")
    if values.get("quantization_config") is not None:
        method = values["quantization_config"]
        raise bad_field("quantization_config", method, "none: weights in bf16, f16 or f32")
    return str(family)


def _rope(values: Mapping[str, Any], max_position: int) -> tuple[float, RopeScaling]:
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise bad_field("rope_scaling", given, "an object or null")
    parameters = dict(given)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise bad_field("rope_parameters", given, "one object for all layers")
    partial = parameters.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise bad_field("partial_rotary_factor", partial, "1.0: all of head_dim is rotated")
    if values.get("original_max_position_embeddings") is not None:
        original = values["original_max_position_embeddings"]
        parameters["original_max_position_embeddings"] = original
    theta = _number(parameters, "rope_theta", _number(values, "rope_theta", _DEFAULT_THETA))
    return theta, RopeScaling.from_hf(parameters, max_position)


def _sliding(
    values: Mapping[str, Any], family: str, num_layers: int
) -> tuple[int, tuple[bool, ...]]:
    if family == "llama":
        return 0, ()
    window = values.get("sliding_window", _DEFAULT_WINDOW)
    if window is None or (family != "mistral" and not _flag(values, "use_sliding_window")):
        return 0, ()
    window = _integer(values, "sliding_window", _DEFAULT_WINDOW)
    kinds = values.get("layer_types")
    if kinds is None:
        first = 0 if family == "mistral" else _integer(values, "max_window_layers", 28)
        return window, tuple(layer >= first for layer in range(num_layers))
    allowed = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or any(kind not in allowed for kind in kinds):
        raise bad_field("layer_types", kinds, "a list of " + " or ".join(allowed))
    if family == "mistral" and "full_attention" in kinds:
        raise bad_field("layer_types", kinds, "sliding_attention in every layer of a mistral")
    return window, tuple(kind == "sliding_attention" for kind in kinds)


def _integer(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_field(name, value, "an integer")
    return value


def _number(values: Mapping[str, Any], name: str, default: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    number = as_float(value)
    if number is None:
        raise bad_field(name, value, "a number")
    return number


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_field(name, value, "true or false")
    return bool(value)


def token_ids(values: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Read a field that is one token id, a list of them, or null."""
    value = values.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
        raise bad_field(name, value, "a token id, a list of token ids or null")
    return tuple(ids)


def first_or_none(ids: tuple[int, ...]) -> int | None:
    """First of some ids; None if there is none."""
    return ids[0] if ids else None
