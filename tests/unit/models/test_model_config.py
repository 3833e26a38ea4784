"""read_config against transformers' own configurations, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_files import TINY
from tiny_models import CONFIGS, LLAMAS

from flowprefill.errors import CheckpointError
from flowprefill.models.families import read_config
from flowprefill.models.hf_config import HfConfig
from flowprefill.models.model_config import ModelConfig


def parsed(family: str, **settings: Any) -> ModelConfig:
    """Parse what transformers would save."""
    return read_config(CONFIGS[family](**(TINY | settings)).to_dict())


def old_style(**changes: Any) -> dict[str, Any]:
    """A config.json as transformers 4 wrote it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 128,
        "torch_dtype": "bfloat16",
    } | changes


@pytest.mark.parametrize("family", LLAMAS)
def test_sizes_of_every_family_equal_transformers(family: str) -> None:
    theirs = CONFIGS[family](**TINY)
    ours = parsed(family)
    assert ours.family == family
    assert ours.vocab_size == theirs.vocab_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim) == (4, 2, 8)
    assert ours.rms_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == ((2,) if family in ("llama", "mistral") else ())


def test_null_kv_heads_mean_one_per_head() -> None:
    config = CONFIGS["qwen2"](**TINY).to_dict() | {"num_key_value_heads": None}
    assert read_config(config).num_kv_heads == 4


def test_biases_and_norms_follow_the_family() -> None:
    qwen2, qwen3 = parsed("qwen2"), parsed("qwen3")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (False, False, True)
    llama = parsed("llama", attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    assert parsed("llama").mlp_bias is False


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_layers_equal_transformers(family: str) -> None:
    settings = {"num_hidden_layers": 4, "sliding_window": 16, "max_window_layers": 1}
    theirs = CONFIGS[family](**(TINY | settings), use_sliding_window=True)
    ours = read_config(theirs.to_dict())
    assert ours.sliding_window == 16
    assert ours.sliding_layers == tuple(kind == "sliding_attention" for kind in theirs.layer_types)
    assert ours.sliding_layers == (False, True, True, True)
    unlisted = theirs.to_dict()
    del unlisted["layer_types"]
    assert read_config(unlisted).sliding_layers == ours.sliding_layers


def test_sliding_window_switched_off_is_none() -> None:
    off = parsed("qwen2", use_sliding_window=False, sliding_window=16, max_window_layers=0)
    assert (off.sliding_window, off.sliding_layers) == (0, (False, False))
    assert parsed("mistral", sliding_window=None).sliding_window == 0


def test_mistral_slides_in_every_layer() -> None:
    config = parsed("mistral", sliding_window=16)
    assert (config.sliding_window, config.sliding_layers) == (16, (True, True))


def test_old_style_config_is_read() -> None:
    config = read_config(old_style(rope_scaling={"type": "linear", "factor": 2.0}))
    assert config.rope_theta == 500000.0
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("linear", 2.0)
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert not config.tie_embeddings


def test_token_ids_accepts_one_many_or_none() -> None:
    assert HfConfig({"eos_token_id": [1, 2]}).token_ids("eos_token_id") == (1, 2)
    assert HfConfig({"eos_token_id": 3}).token_ids("eos_token_id") == (3,)
    assert HfConfig({"eos_token_id": None}).token_ids("eos_token_id") == ()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "mamba"}, ["model_type", "mamba", "llama, mistral"]),
        ({"architectures": ["LlamaModel"]}, ["architectures", "LlamaModel", "LlamaForCausalLM"]),
        ({"architectures": 7}, ["architectures", "7", "LlamaForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5", "1.0"]),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, ["spiral", "yarn"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor", "None", "a number"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, ["factor", "-1", "> 0"]),
        ({"rope_scaling": [1]}, ["rope_scaling", "[1]", "an object"]),
        ({"rope_parameters": {"full_attention": {}}}, ["rope_parameters", "one object"]),
        ({"hidden_size": "32"}, ["hidden_size", "'32'", "an integer"]),
        ({"hidden_size": None}, ["hidden_size", "None", "an integer"]),
        ({"num_hidden_layers": 2**30}, ["num_hidden_layers", "1073741824", "1..4096"]),
        ({"vocab_size": 0}, ["vocab_size", "0", ">= 1"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads", "3", "divisor of 4"]),
        ({"head_dim": 7}, ["head_dim", "7", "even"]),
        ({"rms_norm_eps": -1.0}, ["rms_eps", "-1.0", "> 0"]),
        ({"rope_theta": "big"}, ["rope_theta", "big", "a number"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "yes", "true or false"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id", "</s>", "token id"]),
    ],
)
def test_unsupported_config_names_field_value_and_allowed(
    changes: dict[str, Any], names: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(old_style(**changes))
    for name in names:
        assert name in caught.value.message


def test_mixed_layers_of_a_mistral_are_refused() -> None:
    config = CONFIGS["mistral"](**TINY).to_dict()
    config["layer_types"] = ["sliding_attention", "full_attention"]
    with pytest.raises(CheckpointError, match="layer_types"):
        read_config(config)
