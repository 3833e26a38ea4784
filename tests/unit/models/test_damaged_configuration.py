"""Every field of a model folder's JSON files, with every kind of value: it loads or is named."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_hf_folder import write_tokenizer

from flowprefill.errors import CheckpointError
from flowprefill.models.checkpoint import open_checkpoint
from flowprefill.models.gguf_tokenizer import MAX_TOKEN_CHARS
from flowprefill.models.model_config import rope_inverse_frequencies
from flowprefill.models.tokenizer_file import MAX_TOKEN_ID

FIELDS = {
    "config.json": [
        "architectures", "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size", "rms_norm_eps",
        "max_position_embeddings", "original_max_position_embeddings", "rope_theta", "rope_scaling",
        "rope_parameters", "partial_rotary_factor", "sliding_window", "use_sliding_window",
        "layer_types", "max_window_layers", "hidden_act", "quantization_config", "bos_token_id",
        "eos_token_id", "tie_word_embeddings", "attention_bias", "mlp_bias",
    ],
    "tokenizer_config.json": [
        "bos_token", "eos_token", "pad_token", "image_token", "add_bos_token", "chat_template",
        "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder",
    ],
    "special_tokens_map.json": ["eos_token", "image_token", "additional_special_tokens"],
    "added_tokens.json": ["<x>", ""],
    "generation_config.json": [
        "bos_token_id", "eos_token_id", "temperature", "top_p", "top_k", "min_p",
        "repetition_penalty", "max_new_tokens",
    ],
    "tokenizer.json": ["model", "added_tokens", "normalizer", "pre_tokenizer", "decoder"],
}  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, -1, 7, 0.5, 10**400, 1e308, math.inf, math.nan, "word", "", "\ud800", [], [7],
    ["word"], [None], [[]], [{}], {}, {"content": 7}, {"content": "\udc00"}, {"type": 7},
    [{"name": [], "template": 7}], [{"name": "default", "template": 7}],
    {"rope_type": "yarn", "factor": 0}, {"rope_type": "yarn", "factor": 1e-300, "rope_theta": 1.5},
    {"rope_type": "yarn", "factor": 4, "rope_theta": 1},
    {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 10**400},
    {"rope_type": "llama3", "factor": 1e-40, "low_freq_factor": 1, "high_freq_factor": 4},
]  # fmt: skip


@pytest.fixture
def folder(save_tiny: Callable[..., Any]) -> Path:
    _, path = save_tiny("qwen2")
    write_tokenizer(path)
    return Path(path)


def use(folder: Path) -> None:
    """Read all that the engine reads but the weights."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer.vocab_size > 0
    assert checkpoint.chat_template is not None
    rope_inverse_frequencies(checkpoint.config)


@pytest.mark.parametrize(
    ("file", "field"), [(file, field) for file, fields in FIELDS.items() for field in fields]
)
def test_any_value_loads_or_is_a_checkpoint_error(folder: Path, file: str, field: str) -> None:
    path = folder / file
    values = json.loads(path.read_text()) if path.exists() else {}
    for value in VALUES:
        path.write_text(json.dumps({**values, field: value}))
        with contextlib.suppress(CheckpointError):
            use(folder)


@pytest.mark.parametrize("file", FIELDS)
@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"null", b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000],
    ids=["empty", "list", "null", "bytes", "deep list", "deep object", "number"],
)
def test_file_that_is_no_object_is_named(folder: Path, file: str, raw: bytes) -> None:
    (folder / file).write_bytes(raw)
    with pytest.raises(CheckpointError, match=file):
        use(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config.json: architectures", 7),
        ("config.json: hidden_size", -1),
        ("generation_config.json: eos_token_id", "</s>"),
        ("config.json: rope_theta", 1),
        ("tokenizer_config.json: chat_template", ["{{ messages }}"]),
        ("tokenizer_config.json: bos_token", "\ud800"),
    ],
)
def test_the_field_is_named(folder: Path, field: str, value: Any) -> None:
    file, _, name = field.partition(": ")
    values = json.loads((folder / file).read_text())
    yarn = {"rope_scaling": {"type": "yarn", "factor": 4}, "rope_parameters": None}
    extra = yarn if name == "rope_theta" else {}
    (folder / file).write_text(json.dumps({**values, **extra, name: value}))
    with pytest.raises(CheckpointError, match=f"^/.*{file}.*{name}: got ") as caught:
        use(folder)
    assert str(caught.value.param).endswith(name)


@pytest.mark.parametrize("token_id", [4_000_000_000, MAX_TOKEN_ID + 1, -1, 1.5, "5", 10**400])
@pytest.mark.parametrize("where", ["vocab", "added"])
def test_token_id_beyond_all_bounds_is_refused(folder: Path, where: str, token_id: Any) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    if where == "vocab":
        values["model"]["vocab"]["huge"] = token_id
    else:
        values["added_tokens"][0]["id"] = token_id
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"(vocab\['huge'\]|added_tokens\[0\].id): got"):
        use(folder)


def test_token_of_a_book_is_refused(tiny_gguf: Callable[..., Any], tmp_path: Path) -> None:
    made = tiny_gguf()
    made.tokenizer["tokenizer.ggml.tokens"][3] = "b" * (MAX_TOKEN_CHARS + 1)
    with pytest.raises(CheckpointError, match=r"tokens\[3\]: got '4097 characters'"):
        assert open_checkpoint(made.write(tmp_path / "m.gguf")).tokenizer
