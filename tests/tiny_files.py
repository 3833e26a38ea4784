"""Sizes of tiny models of tests of files, and tiny GGUF files made of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from flowprefill.models.checkpoint import Checkpoint
from flowprefill.models.weight_names import gguf_name

TINY = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row order in which llama GGUF files hold q and k: (0, d/2), (1, d/2 + 1), … of each head."""
    rows = weight.shape[0] // heads
    order = [
        head * rows + pair + half * (rows // 2)
        for head in range(heads)
        for pair in range(rows // 2)
        for half in (0, 1)
    ]
    return weight[order]


class TinyGguf:
    """Writes a GGUF file of a tiny checkpoint; metadata and tensors can be changed first."""

    def __init__(self, checkpoint: Checkpoint, architecture: str) -> None:
        config = checkpoint.config
        self.architecture = architecture
        self.metadata: dict[str, Any] = {
            "context_length": config.max_position,
            "embedding_length": config.hidden_size,
            "block_count": config.num_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_heads,
            "attention.head_count_kv": config.num_kv_heads,
            "attention.key_length": config.head_dim,
            "attention.layer_norm_rms_epsilon": config.rms_eps,
            "rope.freq_base": config.rope_theta,
        }
        self.tensors: dict[str, np.ndarray] = {}
        self.quantised: dict[str, gguf.GGMLQuantizationType] = {}
        for name, tensor in checkpoint.weights():
            values = tensor.float().numpy()
            if architecture == "llama" and name.rpartition(".")[2] in ("q", "q_bias"):
                values = permuted(values, config.num_heads)
            if architecture == "llama" and name.rpartition(".")[2] in ("k", "k_bias"):
                values = permuted(values, config.num_kv_heads)
            if name.endswith("norm"):
                values = values + np.float32(config.norm_offset)
            stacked, _, expert = gguf_name(name).partition("[")
            before = self.tensors[stacked] if expert not in ("", "0]") else None
            if expert:  # all in one tensor
                values = values[None]
            self.tensors[stacked] = values if before is None else np.concatenate([before, values])
        self.tokenizer: dict[str, Any] = byte_tokenizer(config.vocab_size)

    def write(self, path: Path) -> Path:
        """Write the file."""
        writer = gguf.GGUFWriter(path, self.architecture)
        prefixed = {f"{self.architecture}.{key}": value for key, value in self.metadata.items()}
        for key, value in (prefixed | self.tokenizer).items():
            add_value(writer, key, value)
        for name, values in self.tensors.items():
            kind = self.quantised.get(name)
            if kind is None:
                writer.add_tensor(name, np.ascontiguousarray(values))
            elif "_K" in kind.name:  # which the package reads but does not write
                writer.add_tensor(name, random_blocks(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def random_blocks(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Random blocks of a type with two levels of scales, about as large as the values."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(values.size).integers(
        0, 256, (values.size // block, size), dtype=np.uint8
    )
    # Quants, times scales of 6 bits or 8, are in the thousands: see gguf.quants.
    scale = np.float16(np.abs(values).mean() / 1000)
    fields = {"Q4_K": {0: scale, 2: scale * 8}, "Q5_K": {0: scale / 2, 2: scale * 8},
              "Q6_K": {208: scale}}[kind.name]  # fmt: skip
    for at, value in fields.items():
        raw[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    return raw.reshape(*values.shape[:-1], -1)


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one key with the GGUF type that its Python type suggests."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def byte_tokenizer(vocab_size: int) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer: letters, two merges and two control tokens."""
    letters = [chr(0x61 + index) for index in range(vocab_size - 5)]
    letters = letters[:26] + [chr(0x41 + index) for index in range(len(letters) - 26)]
    tokens = ["<|end|>", "<|start|>", *letters, "Ġ", "ab", "abc"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }


def change_json(path: Path, **values: Any) -> None:
    """Overwrite keys of a JSON file; None removes a key."""
    read: Mapping[str, Any] = json.loads(path.read_text())
    changed = {key: value for key, value in {**read, **values}.items() if value is not None}
    path.write_text(json.dumps(changed))
