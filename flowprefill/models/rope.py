"""Rotary embedding: which scaling a model wants and the inverse frequencies that follow from it.

Called by model_config; the native model only multiplies positions by what is returned here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flowprefill.errors import CheckpointError, shortened

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than those trained on.

    Attributes:
        kind: one of ROPE_KINDS; fields that a kind does not use keep their default.
        factor: context extension, > 0 (linear, llama3, yarn).
        low_freq_factor: llama3; wavelengths above original_max_position / this get
            divided by factor.
        high_freq_factor: llama3; wavelengths below original_max_position / this stay.
        original_max_position: positions of pre-training, tokens (llama3, yarn).
        beta_fast: yarn; dimensions turning more often than this over the original context stay.
        beta_slow: yarn; dimensions turning less often than this are divided by factor.
        attention_factor: yarn; multiplies cos and sin; None derives it from factor and the mscales.
        mscale: yarn; numerator's weight when attention_factor is derived; None is unset.
        mscale_all_dim: yarn; denominator's weight; None is unset.
        truncate: yarn; round the border dimensions to integers.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise _bad("rope_type", self.kind, "one of " + ", ".join(ROPE_KINDS))
        if self.kind != "default" and not self.factor > 0:
            raise _bad("factor", self.factor, "a number > 0")
        if self.kind in ("llama3", "yarn") and self.original_max_position < 1:
            raise _bad(
                "original_max_position_embeddings", self.original_max_position, "an integer >= 1"
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise _bad(
                "high_freq_factor",
                self.high_freq_factor,
                f"more than low_freq_factor = {self.low_freq_factor}, both > 0",
            )
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise _bad("beta_fast", self.beta_fast, f"more than beta_slow = {self.beta_slow} > 0")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], max_position: int) -> RopeScaling:
        """Read the ``rope_scaling`` / ``rope_parameters`` object of a config.json.

        Args:
            values: the object; its kind is under ``rope_type`` or, in old files, ``type``.
            max_position: the config's ``max_position_embeddings``, stands in where a kind needs the
                original context and the object does not name it.

        Raises:
            CheckpointError: unknown kind, or a field that is missing or of the wrong type.
        """
        kind = values.get("rope_type", values.get("type", "default"))
        if kind not in ROPE_KINDS:
            raise _bad("rope_type", kind, "one of " + ", ".join(ROPE_KINDS))
        if kind == "default":
            return cls()
        original = int(
            _number(values, "original_max_position_embeddings", default=float(max_position))
        )
        if kind == "yarn" and values.get("factor") is None:
            return cls._yarn(values, max_position / max(original, 1), original)
        factor = _number(values, "factor")
        if kind == "linear":
            return cls(kind, factor)
        if kind == "yarn":
            return cls._yarn(values, factor, original)
        low, high = _number(values, "low_freq_factor"), _number(values, "high_freq_factor")
        return cls(kind, factor, low, high, original)

    @classmethod
    def _yarn(cls, values: Mapping[str, Any], factor: float, original: int) -> RopeScaling:
        return cls(
            "yarn",
            factor,
            original_max_position=original,
            beta_fast=_number(values, "beta_fast", default=32.0) or 32.0,
            beta_slow=_number(values, "beta_slow", default=1.0) or 1.0,
            attention_factor=_optional_number(values, "attention_factor"),
            mscale=_optional_number(values, "mscale"),
            mscale_all_dim=_optional_number(values, "mscale_all_dim"),
            truncate=bool(values.get("truncate", True)),
        )


def _bad(name: str, value: Any, allowed: str) -> CheckpointError:
    message = f"rope_scaling.{name}: got {shortened(value)}, expected {allowed}"
    return CheckpointError(message, param=name)


def as_float(value: Any) -> float | None:
    """Return a number of a JSON file as a float; None if it is none, or too large for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _optional_number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    number = as_float(value)
    if number is None or not math.isfinite(number):
        raise _bad(name, value, "a number")
    return number


def _number(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = _optional_number(values, name)
    if value is not None:
        return value
    if default is None:
        raise _bad(name, None, "a number")
    return default


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling, freq_factors: Sequence[float] = ()
) -> tuple[npt.NDArray[np.float32], float]:
    """Compute the angle per position of every pair of dimensions (i, i + head_dim / 2).

    The arithmetic is single precision on purpose: it is what the models were trained and are
    published with, and at 100k positions an angle of double precision would differ by 0.01 rad.

    Args:
        head_dim: dimensions of a head, even.
        theta: base of the geometric series, > 0.
        scaling: the model's scaling.
        freq_factors: divisors per pair (GGUF tensor ``rope_freqs.weight``), [head_dim / 2],
            or empty.

    Returns:
        float32 array [head_dim / 2] in radians per position, and the factor that multiplies both
        cos and sin (1.0 but for yarn).

    Source:
        default: Su et al. 2021 (RoFormer), eq. 15. linear: Chen et al. 2023 (position
        interpolation), eq. 4. llama3: Llama 3.1's published reference. yarn: Peng et al. 2023,
        section 3.2 "NTK-by-parts", and eq. 22 for the attention factor.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    periods = torch.pow(theta, exponents)
    inverse = 1.0 / periods
    attention = 1.0
    if scaling.kind == "linear":
        inverse = inverse / scaling.factor
    elif scaling.kind == "llama3":
        inverse = _llama3(inverse, scaling)
    elif scaling.kind == "yarn":
        inverse = _yarn_blend(periods, head_dim, theta, scaling)
        attention = yarn_attention_factor(scaling)
    if len(freq_factors):
        inverse = inverse / torch.tensor(list(freq_factors), dtype=torch.float32)
    if not (torch.isfinite(inverse).all() and math.isfinite(attention)):
        raise _bad("factor", scaling.factor, "one that leaves every rotary frequency finite")
    return inverse.numpy(), attention


def _llama3(inverse: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    turns = scaling.original_max_position / (2.0 * math.pi / inverse)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = (turns - low) / (high - low)
    blended = (1.0 - keep) * inverse / scaling.factor + keep * inverse
    outer = torch.where(turns < low, inverse / scaling.factor, inverse)
    return torch.where((turns < low) | (turns > high), outer, blended)


def _yarn_blend(
    periods: torch.Tensor, head_dim: int, theta: float, scaling: RopeScaling
) -> torch.Tensor:
    def border(turns: float) -> float:
        """Dimension pair that makes ``turns`` full turns over the original context."""
        wavelength = scaling.original_max_position / (turns * 2.0 * math.pi)
        return head_dim * math.log(wavelength) / (2.0 * math.log(theta))

    low, high = border(scaling.beta_fast), border(scaling.beta_slow)
    if scaling.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    width = high - low if high != low else 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    keep = 1.0 - torch.clamp((pairs - low) / width, 0.0, 1.0)
    return 1.0 / (scaling.factor * periods) * (1.0 - keep) + 1.0 / periods * keep


def yarn_attention_factor(scaling: RopeScaling) -> float:
    """Factor on cos and sin under yarn: given, or from the context extension (and the mscales)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1.0 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)
