"""HfConfig: typed access to a parsed config.json, and what all decoders read from one alike.

Families (models/families) read their configuration with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowprefill.errors import CheckpointError
from flowprefill.models.graph import Activation
from flowprefill.models.model_config import ModelConfig, bad_field, checked_layers
from flowprefill.models.rope import RopeScaling, as_float

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_LAYER_KINDS = ("sliding_attention", "full_attention")


@dataclass(frozen=True, slots=True)
class HfConfig:
    """The values of a config.json as transformers 4 or 5 writes it; a null is an absent key.

    All methods raise CheckpointError for a value of the wrong kind: field, value, what is allowed.

    Attributes:
        path: of an object inside the file: what comes before its fields' names in errors.
    """

    values: Mapping[str, Any]
    path: str = ""

    def integer(self, name: str, default: int | None = None) -> int:
        """Read an integer; no default: it has to be there."""
        value = self.values.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**31:
            raise self._bad(name, value, "an integer below 2^31")
        return value

    def number(self, name: str, default: float) -> float:
        """Read a number."""
        value = self.values.get(name)
        if value is None:
            return default
        number = as_float(value)
        if number is None or not math.isfinite(number):
            raise self._bad(name, value, "a number")
        return number

    def positive(self, name: str, default: float) -> float:
        """Read a number above 0."""
        value = self.number(name, default)
        if value <= 0:
            raise self._bad(name, value, "a number > 0")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Read a truth value."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._bad(name, value, "true or false")
        return default if value is None else value

    def mapping(self, name: str) -> dict[str, Any]:
        """Read an object; empty if absent."""
        value = self.values.get(name) or {}
        if not isinstance(value, Mapping):
            raise self._bad(name, value, "an object or null")
        return dict(value)

    def inside(self, name: str) -> HfConfig:
        """Read an object whose fields are read next; empty if absent."""
        return HfConfig(self.mapping(name), f"{self.path}{name}.")

    def choice(self, name: str, allowed: Sequence[str], default: str | None = None) -> str:
        """Read one of some words; no default: it has to be there."""
        value = self.values.get(name)
        if value is None:
            value = default
        if not isinstance(value, str) or value not in allowed:
            raise self._bad(name, value, "one of " + ", ".join(map(repr, allowed)))
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Read one token id, a list of them, or null."""
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(one, bool) or not isinstance(one, int) for one in ids):
            raise self._bad(name, value, "a token id, a list of token ids or null")
        return tuple(ids)

    def activation(self, name: str, default: str) -> Activation:
        """Read the name of a gate's activation."""
        value = self.values.get(name) or default
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise self._bad(name, value, "one of " + ", ".join(map(repr, _ACTIVATIONS)))
        return _ACTIVATIONS[value]

    def rope(self) -> dict[str, Any]:
        """Read the rotary parameters, of whichever form, as one object for all layers."""
        name = "rope_scaling" if self.values.get("rope_scaling") else "rope_parameters"
        given = self.mapping(name)
        if any(isinstance(value, Mapping) for value in given.values()):
            raise self._bad(name, given, "one object for all layers")
        outside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        return {key: self.values[key] for key in outside[:2] if key in self.values} | given | {
            key: self.values[key] for key in outside[2:] if self.values.get(key) is not None
        }  # fmt: skip

    def sliding(
        self, default: int | None, slides: Callable[[int], bool] = lambda _: True
    ) -> dict[str, Any]:
        """Read ModelConfig's sliding_window and sliding_layers.

        Args:
            default: window where the file is silent; None: none. A null always means none.
            slides: whether a layer slides where the file does not list ``layer_types``.
        """
        if self.values.get("sliding_window", default) is None:
            return {}
        layers = checked_layers("num_hidden_layers", self.integer("num_hidden_layers"))
        kinds = self.values.get("layer_types")
        if kinds is None:
            kinds = [_LAYER_KINDS[0 if slides(layer) else 1] for layer in range(layers)]
        if not isinstance(kinds, list) or any(kind not in _LAYER_KINDS for kind in kinds):
            raise self._bad("layer_types", kinds, "a list of " + " or ".join(_LAYER_KINDS))
        return {
            "sliding_window": self.integer("sliding_window", default),
            "sliding_layers": tuple(kind == _LAYER_KINDS[0] for kind in kinds),
        }

    def sliding_everywhere(self, default: int | None = None) -> dict[str, Any]:
        """Read them of a family whose window holds in every layer; see sliding."""
        found = self.sliding(default)
        if not all(found.get("sliding_layers", ())):
            kinds, model = self.values["layer_types"], self.values["model_type"]
            raise self._bad("layer_types", kinds, f"sliding_attention in every layer of a {model}")
        return found

    def _bad(self, name: str, value: Any, allowed: str) -> CheckpointError:
        return bad_field(self.path + name, value, allowed)


def read_decoder(
    values: HfConfig,
    *,
    max_position: int,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    theta: float = 10_000.0,
    rms_eps: float = 1e-6,
    rotary_part: float | None = None,
    tied: bool = False,
    **fields: Any,
) -> ModelConfig:
    """Read what every decoder has; families pass what transformers assumes where a file is silent.

    Args:
        head_dim: None: hidden_size / num_attention_heads.
        kv_heads: None: one per head, which an explicit null always means.
        rotary_part: part of a head's dimensions that turn; None: all, and a file that
            says otherwise is refused.
        fields: more fields of ModelConfig, as they are; they win.
    """
    if not values.flag("is_causal", True):
        raise bad_field("is_causal", False, "true: a model that writes text")
    num_heads = values.integer("num_attention_heads")
    hidden_size = values.integer("hidden_size")
    max_position = values.integer("max_position_embeddings", max_position)
    head_dim = values.integer("head_dim", head_dim or hidden_size // max(num_heads, 1))
    rope = HfConfig(values.rope())
    scaling = RopeScaling.from_hf(rope.values, max_position)
    if kv_heads is None or "num_key_value_heads" in values.values:
        kv_heads = num_heads
    common: dict[str, Any] = {
        "family": values.values["model_type"],
        "vocab_size": values.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": values.integer("intermediate_size"),
        "num_layers": checked_layers("num_hidden_layers", values.integer("num_hidden_layers")),
        "num_heads": num_heads,
        "num_kv_heads": values.integer("num_key_value_heads", kv_heads),
        "head_dim": head_dim,
        "rms_eps": values.number("rms_norm_eps", rms_eps),
        "rope_theta": rope.number("rope_theta", theta),
        "rope_scaling": scaling,
        "rotary_dim": _rotary_dim(rope, head_dim, rotary_part),
        "max_position": scaling.longest_context(max_position),
        "tie_embeddings": values.flag("tie_word_embeddings", tied),
        "bos_token_id": next(iter(values.token_ids("bos_token_id")), None),
        "eos_token_ids": values.token_ids("eos_token_id"),
    }
    if "activation" not in fields:
        common["activation"] = values.activation("hidden_act", "silu")
    return ModelConfig(**(common | fields))


def _rotary_dim(rope: HfConfig, head_dim: int, rotary_part: float | None) -> int:
    part = rope.number("partial_rotary_factor", rotary_part or 1.0)
    if rotary_part is None and part != 1.0:
        raise bad_field("partial_rotary_factor", part, "1.0: all of head_dim is rotated")
    if not 0 < part <= 1 or head_dim * part < 2:
        raise bad_field("partial_rotary_factor", part, f"part of {head_dim} dimensions, 2 or more")
    return int(head_dim * part)
