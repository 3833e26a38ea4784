"""Rotary frequencies of every scaling against transformers, and against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flowprefill.errors import CheckpointError
from flowprefill.models.families import read_config
from flowprefill.models.model_config import ModelConfig, rope_inverse_frequencies
from flowprefill.models.rope import RopeScaling, inverse_frequencies

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096,
     "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096,
     "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
]  # fmt: skip


def theirs_and_ours(
    scaling: dict[str, Any] | None, theta: float, head_dim: int
) -> tuple[transformers.LlamaConfig, ModelConfig]:
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_hidden_layers=1,
        max_position_embeddings=16384,
        rope_theta=theta,
        rope_scaling=scaling,
    )
    return config, read_config(config.to_dict())


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_frequencies_equal_transformers(
    scaling: dict[str, Any], theta: float, head_dim: int
) -> None:
    theirs, ours = theirs_and_ours(scaling, theta, head_dim)
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu")
    inverse, factor = rope_inverse_frequencies(ours)
    assert inverse.dtype == np.float32
    np.testing.assert_allclose(inverse, expected.numpy(), rtol=1e-7)
    assert factor == pytest.approx(expected_factor, rel=1e-7)


def test_default_frequencies_equal_transformers_and_the_formula() -> None:
    theirs, ours = theirs_and_ours(None, 10_000.0, 64)
    inverse, factor = rope_inverse_frequencies(ours)
    np.testing.assert_allclose(inverse, LlamaRotaryEmbedding(theirs).inv_freq.numpy(), rtol=1e-7)
    formula = 10_000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(inverse, formula, rtol=1e-6)
    assert factor == 1.0


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(32)],
    "long_factor": [1.0 + 0.5 * i for i in range(32)],
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize("served", [4096, 4097, 16384])
@pytest.mark.parametrize("extra", [{}, {"factor": 8.0}, {"attention_factor": 1.2}])
def test_longrope_follows_the_contexts_that_are_served(extra: dict[str, Any], served: int) -> None:
    theirs, ours = theirs_and_ours(LONGROPE | extra, 10_000.0, 64)
    expected, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=served)
    scaling = ours.rope_scaling.served_up_to(served)
    inverse, our_factor = inverse_frequencies(64, 10_000.0, scaling)
    np.testing.assert_allclose(inverse, expected.numpy(), rtol=1e-6)
    assert our_factor == pytest.approx(factor, rel=1e-7)


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_old_names_of_longrope(kind: str) -> None:
    values = {"type": kind, "short_factor": [1.0], "long_factor": [2.0]}
    assert RopeScaling.from_hf(values, 4096).kind == "longrope"


@pytest.mark.parametrize(
    ("scaling", "reached"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0],
          "factor": 2.0}, 256),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0],
          "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}, 128),
        ({}, 128),
    ],
)  # fmt: skip
def test_scaling_extends_the_longest_context(scaling: dict[str, Any], reached: int) -> None:
    assert RopeScaling.from_hf(scaling, 128).longest_context(128) == reached


def test_frequency_factors_divide() -> None:
    plain, _ = inverse_frequencies(8, 10_000.0, RopeScaling())
    divided, _ = inverse_frequencies(8, 10_000.0, RopeScaling(), (1.0, 2.0, 4.0, 8.0))
    np.testing.assert_allclose(divided * np.array([1, 2, 4, 8]), plain, rtol=1e-7)


def test_yarn_factor_defaults_to_the_ratio_of_contexts() -> None:
    values = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}
    scaling = RopeScaling.from_hf(values, max_position=4096)
    assert scaling.factor == 4.0
    _, factor = inverse_frequencies(64, 10_000.0, scaling)
    assert factor == pytest.approx(0.1 * math.log(4.0) + 1.0)


@pytest.mark.parametrize(
    ("kind", "values", "name"),
    [
        ("llama3", {"low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor"),
        ("llama3", {"original_max_position": 0}, "original_max_position_embeddings"),
        ("yarn", {"beta_fast": 1.0, "beta_slow": 1.0}, "beta_fast"),
        ("yarn", {"factor": float("nan")}, "factor"),
        ("longrope", {}, "long_factor"),
        ("spiral", {}, "rope_type"),
    ],
)
def test_bad_scaling_names_the_field(kind: str, values: dict[str, Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        RopeScaling(**({"kind": kind, "factor": 2.0, "original_max_position": 64} | values))
