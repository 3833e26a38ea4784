"""Rotary embedding: which scaling a model wants and the inverse frequencies that follow from it.

Called by model_config; the native model only multiplies positions by what is returned here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flowprefill.errors import CheckpointError, shortened

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than those trained on.

    Attributes:
        kind: one of ROPE_KINDS; fields that a kind does not use keep their default.
        factor: context extension, > 0 (linear, dynamic, llama3, yarn, longrope).
        low_freq_factor: llama3; wavelengths above original_max_position / this get
            divided by factor.
        high_freq_factor: llama3; wavelengths below original_max_position / this stay.
        original_max_position: positions of pre-training, tokens (dynamic, llama3, yarn, longrope).
        beta_fast: yarn; dimensions turning more often than this over the original context stay.
        beta_slow: yarn; dimensions turning less often than this are divided by factor.
        attention_factor: yarn, longrope; multiplies cos and sin; None derives it from factor (and
            the mscales).
        mscale: yarn; numerator's weight when attention_factor is derived; None is unset.
        mscale_all_dim: yarn; denominator's weight; None is unset.
        truncate: yarn; round the border dimensions to integers.
        short_factors: longrope; divisors of the inverse frequencies in models served up to
            original_max_position, [rotary_dim / 2].
        long_factors: longrope; those in models served beyond it.
        is_long: longrope; which of both hold. One choice for all requests: keys in the cache
            keep the angles they were stored with.
        served: dynamic; the longest context of all requests, which the base follows, for the same
            reason; 0: up to original_max_position, where nothing is scaled.
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
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    is_long: bool = False
    served: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise _bad("rope_type", self.kind, "one of " + ", ".join(ROPE_KINDS))
        if self.kind != "default" and not self.factor > 0:
            raise _bad("factor", self.factor, "a number > 0")
        if (
            self.kind in ("dynamic", "llama3", "yarn", "longrope")
            and self.original_max_position < 1
        ):
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
        if self.kind == "longrope" and self.factor > 1 and self.original_max_position < 2:
            raise _bad("original_max_position_embeddings", self.original_max_position, "2 or more")
        if self.kind == "longrope" and not (self.short_factors and self.long_factors):
            raise _bad("long_factor", self.long_factors, "a list of numbers, as short_factor")

    def factor_lists(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the lists of one divisor per pair of dimensions; empty where there are none."""
        return self.short_factors, self.long_factors

    def longest_context(self, max_position: int) -> int:
        """Return the tokens that the scaled model reaches.

        Args:
            max_position: what the file names. Under linear and dynamic the context before scaling;
                under yarn and longrope that in some files, the one that is reached in others.
        """
        reached = float(max_position)
        if self.kind in ("linear", "dynamic"):
            reached = max_position * max(self.factor, 1.0)
        elif self.kind in ("yarn", "longrope"):
            reached = max(reached, self.original_max_position * self.factor)
        return round(min(reached, 2.0**31))  # too much for any model: ModelConfig names it

    def served_up_to(self, tokens: int) -> RopeScaling:
        """Return the scaling of a model whose requests have at most so many tokens."""
        return replace(self, is_long=tokens > self.original_max_position, served=tokens)

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
        kinds = (values.get("rope_type"), values.get("type"), "default")
        kind = next(kind for kind in kinds if kind is not None)
        if kind == "su" or (kind == "yarn" and "long_factor" in values):  # in old files of Phi-3
            kind = "longrope"
        if kind not in ROPE_KINDS:
            raise _bad("rope_type", kind, "one of " + ", ".join(ROPE_KINDS))
        if kind == "default":
            return cls()
        original = int(
            _number(values, "original_max_position_embeddings", default=float(max_position))
        )
        reached = max_position / max(original, 1)
        if kind == "longrope":
            return cls._longrope(values, _number(values, "factor", default=reached), original)
        if kind == "yarn" and values.get("factor") is None:
            return cls._yarn(values, reached, original)
        factor = _number(values, "factor")
        if kind == "linear":
            return cls(kind, factor)
        if kind == "dynamic":
            return cls(kind, factor, original_max_position=max_position)
        if kind == "yarn":
            return cls._yarn(values, factor, original)
        low, high = _number(values, "low_freq_factor"), _number(values, "high_freq_factor")
        return cls(kind, factor, low, high, original)

    @classmethod
    def _longrope(cls, values: Mapping[str, Any], factor: float, original: int) -> RopeScaling:
        return cls(
            "longrope",
            factor,
            original_max_position=original,
            attention_factor=_optional_number(values, "attention_factor"),
            short_factors=_numbers(values, "short_factor"),
            long_factors=_numbers(values, "long_factor"),
        )

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


def _numbers(values: Mapping[str, Any], name: str) -> tuple[float, ...]:
    given = values.get(name)
    numbers = [as_float(one) for one in given] if isinstance(given, list) else [None]
    found = tuple(one for one in numbers if one is not None and 0 < one < math.inf)
    if len(found) != len(numbers):
        raise _bad(name, given, "a list of numbers > 0")
    return found


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling, freq_factors: Sequence[float] = ()
) -> tuple[npt.NDArray[np.float32], float]:
    """Compute the angle per position of every pair of dimensions (i, i + head_dim / 2).

    The arithmetic is single precision on purpose: it is what the models were trained and are
    published with, and at 100k positions an angle of double precision would differ by 0.01 rad.

    Args:
        head_dim: dimensions of a head that turn, even.
        theta: base of the geometric series, > 0.
        scaling: the model's scaling.
        freq_factors: divisors per pair (GGUF tensor ``rope_freqs.weight``), [head_dim / 2],
            or empty.

    Returns:
        float32 array [head_dim / 2] in radians per position, and the factor that multiplies both
        cos and sin (1.0 but for yarn and longrope).

    Source:
        default: Su et al. 2021 (RoFormer), eq. 15. linear: Chen et al. 2023 (position
        interpolation), eq. 4. dynamic: NTK-aware interpolation of Peng et al. 2023, section 3.1, by
        the length. llama3: Llama 3.1's published reference. yarn: Peng et al. 2023,
        section 3.2 "NTK-by-parts", and eq. 22 for the attention factor. longrope: Ding et al. 2024,
        with the attention factor of Phi-3's published configuration.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    periods = torch.pow(_dynamic_base(theta, head_dim, scaling), exponents)
    inverse = 1.0 / periods
    attention = 1.0
    if scaling.kind == "linear":
        inverse = inverse / scaling.factor
    elif scaling.kind == "llama3":
        inverse = _llama3(inverse, scaling)
    elif scaling.kind == "yarn":
        inverse = _yarn_blend(periods, head_dim, theta, scaling)
        attention = yarn_attention_factor(scaling)
    elif scaling.kind == "longrope":
        factors = scaling.long_factors if scaling.is_long else scaling.short_factors
        inverse = 1.0 / (torch.tensor(factors, dtype=torch.float32) * periods)
        attention = _longrope_attention_factor(scaling)
    if len(freq_factors):
        inverse = inverse / torch.tensor(list(freq_factors), dtype=torch.float32)
    if not (torch.isfinite(inverse).all() and math.isfinite(attention)):
        raise _bad("factor", scaling.factor, "one that leaves every rotary frequency finite")
    return inverse.numpy(), attention


def _dynamic_base(theta: float, head_dim: int, scaling: RopeScaling) -> float:
    stretched = scaling.served / max(scaling.original_max_position, 1)
    if scaling.kind != "dynamic" or stretched <= 1.0 or head_dim <= 2:
        return theta
    growth = scaling.factor * stretched - (scaling.factor - 1.0)
    return float(theta * max(growth, 1e-30) ** (head_dim / (head_dim - 2)))


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


def _longrope_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1.0:
        return 1.0
    return math.sqrt(1.0 + math.log(scaling.factor) / math.log(scaling.original_max_position))


def rotate_half_rows(values: torch.Tensor, heads: int, turning: int = 0) -> torch.Tensor:
    """Reorder a projection's rows for a rotary embedding that turns rows i and i + d/2 together.

    Llama GGUF files and GLM checkpoints store a head's rows for one that turns neighbours.

    Args:
        values: q or k, [heads * rows, in], or its bias, [heads * rows].
        heads: heads of that projection.
        turning: only the first so many rows of a head turn, d; 0: all.
    """
    by_head = values.reshape(heads, -1, *values.shape[1:])
    turning = turning or by_head.shape[1]
    pairs = by_head[:, :turning].reshape(heads, -1, 2, *values.shape[1:])
    turned = pairs.swapaxes(1, 2).reshape(heads, turning, *values.shape[1:])
    return torch.cat([turned, by_head[:, turning:]], dim=1).reshape(values.shape)
