"""GgufFile: reads a GGUF model (metadata, quantised weights, tokenizer); used by checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from flowprefill.errors import CheckpointError
from flowprefill.models.families import Family, GgufForm, family_of_gguf
from flowprefill.models.gguf_metadata import GgufMetadata, has_values
from flowprefill.models.gguf_parts import read_gguf
from flowprefill.models.gguf_tokenizer import build_tokenizer
from flowprefill.models.model_config import (
    ModelConfig,
    bad_field,
    checked_layers,
    known_ids,
    named_in_errors,
)
from flowprefill.models.rope import RopeScaling
from flowprefill.models.tokenizer import Tokenizer
from flowprefill.models.weight_names import gguf_name

_ROPE_FACTORS = "rope_freqs.weight"
_TEMPLATE = "tokenizer.chat_template"
# Keys of the markers of code models, whose names are in gguf_tokenizer.py.
_FILE_MARK_KEYS = ("fim_pad", "fim_rep", "fim_sep")
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}  # where the file names none, as in llama.cpp
# Names that templates know tokens by, and those in GGUF's keys.
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}


class GgufFile:
    """One model; its file, or the files it is split into, stay memory-mapped while this lives.

    Weights are dequantised one at a time, unless their blocks are asked for.
    """

    def __init__(self, path: Path) -> None:
        """Parse the header and check that every tensor's quantisation can be read.

        Raises:
            CheckpointError: damaged, truncated or not supported; names file, key or tensor.
        """
        self._metadata = read_gguf(path)
        self._check_quantisations()
        with named_in_errors(path):
            family = family_of_gguf(self._metadata.get("general.architecture", str))
            assert family.gguf is not None
            self._form = family.gguf
            self.config = _model_config(self._metadata, family, self._form)
        self.special_tokens: Mapping[str, str] = {
            f"{name}_token": text
            for name, key in _NAMED.items()
            if (text := self._token_text(key)) is not None
        }
        self.chat_templates = _chat_templates(self._metadata)
        self.sampling_defaults: Mapping[str, Any] = {}

    def stored_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, in torch's order."""
        return {name: tensor.shape for name, tensor in self._metadata.tensors.items()}

    def stored_name(self, canonical: str) -> str:
        """GGUF's name of a canonical weight."""
        return gguf_name(canonical)

    def is_ignored(self, stored: str) -> bool:
        """The rotary factors are in the configuration already."""
        return stored == _ROPE_FACTORS

    def stored_bytes(self, stored: str) -> int:
        """Quantised size of a tensor."""
        return self._metadata.tensors[stored].size_bytes

    def stored_type(self, stored: str) -> str:
        """GGUF's name of a tensor's type."""
        return self._metadata.tensors[stored].kind.name

    def load_blocks(self, canonical: str) -> torch.Tensor:
        """Read one weight's blocks, its rows in the order of the graph."""
        raw = self._metadata.raw(self._metadata.tensors[gguf_name(canonical)])
        return self._form.arrange(self.config, canonical, torch.from_numpy(raw))

    def release(self, canonical: str) -> None:
        """Let the kernel drop the pages of a weight from this process's memory."""
        self._metadata.release(self._metadata.tensors[gguf_name(canonical)])

    def load(self, canonical: str) -> torch.Tensor:
        """Dequantise one weight to float32, its rows in the order of the graph."""
        dequantised = _dequantised(self._metadata, gguf_name(canonical))
        values = torch.from_numpy(np.require(dequantised, np.float32, ["C", "W"]))
        return self._form.arrange(self.config, canonical, values)

    def read_tokenizer(self) -> Tokenizer:
        """Build the tokenizer from the ``tokenizer.ggml`` keys."""
        with named_in_errors(self._metadata.path):
            return build_tokenizer(self._metadata, self.config)

    def _token_text(self, name: str) -> str | None:
        token_id = self._metadata.values.get(f"tokenizer.ggml.{name}_token_id")
        tokens = self._metadata.values.get("tokenizer.ggml.tokens", [])
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            return None
        return str(tokens[token_id])

    def _check_quantisations(self) -> None:
        first = {tensor.kind: tensor.name for tensor in self._metadata.tensors.values()}
        for kind, name in first.items():
            block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
            try:
                gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            except NotImplementedError:
                raise CheckpointError(
                    f"tensor {name}: got quantisation {kind.name}, expected one that the gguf "
                    "package can dequantise, e.g. F16, BF16, Q4_0, Q4_1, Q8_0, Q4_K, Q6_K",
                    param=name,
                ) from None


def _dequantised(metadata: GgufMetadata, name: str) -> np.ndarray:
    tensor = metadata.tensors[name]
    values: np.ndarray = gguf.quants.dequantize(metadata.raw(tensor), tensor.kind)
    return values.reshape(tensor.shape)


def _model_config(metadata: GgufMetadata, family: Family, form: GgufForm) -> ModelConfig:
    architecture = form.architecture
    refused = has_values(metadata.values, f"{architecture}.expert_count")
    if refused is not None and not form.has_experts:
        raise bad_field(refused, metadata.values[refused], "0: no mixture of experts")
    causal = f"{architecture}.attention.causal"
    if not metadata.get(causal, bool, True):
        raise bad_field(causal, False, "true: a model that writes text")

    def integer(key: str, default: int | None = None) -> int:
        return int(metadata.get(f"{architecture}.{key}", int, default))

    hidden_size, num_heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", hidden_size // max(num_heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if integer(key, head_dim) != head_dim:
            raise bad_field(f"{architecture}.{key}", integer(key, head_dim), f"{head_dim}")
    num_layers = checked_layers(f"{architecture}.block_count", integer("block_count"))
    tensors = metadata.tensors
    scaling = _rope_scaling(metadata, architecture)
    embedding = tensors.get("token_embd.weight")
    common: dict[str, Any] = {
        "family": family.model_type,
        "vocab_size": embedding.shape[0] if embedding else 1,
        "hidden_size": hidden_size,
        "intermediate_size": integer("feed_forward_length"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_eps": metadata.get(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": metadata.get(f"{architecture}.rope.freq_base", float, 10_000.0),
        "rope_scaling": scaling,
        "rope_freq_factors": _rope_factors(metadata),
        "max_position": scaling.longest_context(integer("context_length")),
        "tie_embeddings": "output.weight" not in tensors,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "o_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": next(iter(_token_ids(metadata, "bos")), None),
        "eos_token_ids": _token_ids(metadata, "eos", "eot", "eom", *_FILE_MARK_KEYS),
    }
    return ModelConfig(**(common | form.read(metadata, common)))


def _token_ids(metadata: GgufMetadata, *names: str) -> tuple[int, ...]:
    tokens = metadata.values.get("tokenizer.ggml.tokens", [])
    count = len(tokens) if isinstance(tokens, list) else 0
    is_sentencepiece = metadata.values.get("tokenizer.ggml.model") == "llama"
    found: list[int] = []
    for name in names:
        assumed = _SENTENCEPIECE_IDS.get(name, -1) if is_sentencepiece else -1
        given = metadata.get(f"tokenizer.ggml.{name}_token_id", int, assumed)
        found.append(given if 0 <= given < count else assumed)
    return known_ids(found, count)


def _chat_templates(metadata: GgufMetadata) -> dict[str, str]:
    """Read the template, and those for certain uses, such as ``….tool_use``."""
    names = {"default": _TEMPLATE} | {
        key.removeprefix(f"{_TEMPLATE}."): key
        for key in metadata.values
        if key.startswith(f"{_TEMPLATE}.")
    }
    found = {name: metadata.get(key, str, "") for name, key in names.items()}
    return {name: text for name, text in found.items() if text}


def _rope_factors(metadata: GgufMetadata) -> tuple[float, ...]:
    if _ROPE_FACTORS not in metadata.tensors:
        return ()
    return tuple(_dequantised(metadata, _ROPE_FACTORS).reshape(-1).tolist())


def _rope_scaling(metadata: GgufMetadata, architecture: str) -> RopeScaling:
    """Read ``rope.scaling.*``; the yarn conventions are those of ggml's rope operator."""
    prefix = f"{architecture}.rope.scaling"

    def number(key: str, default: float) -> float:
        return float(metadata.get(f"{prefix}.{key}", (float, int), default))

    kind = metadata.get(f"{prefix}.type", str, "none")
    old_linear = f"{architecture}.rope.scale_linear"
    if kind == "none" and old_linear in metadata.values:
        return RopeScaling("linear", float(metadata.get(old_linear, (float, int))))
    if kind == "none":
        return RopeScaling()
    factor = number("factor", 1.0)
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind != "yarn":
        raise bad_field(f"{prefix}.type", kind, "none, linear or yarn")
    refused = has_values(metadata.values, f"{prefix}.yarn_log_multiplier")
    if refused is not None:
        raise bad_field(refused, metadata.values[refused], "0")
    context = metadata.get(f"{architecture}.context_length", int)
    derived = 1.0 if factor <= 1.0 else 0.1 * math.log(factor) + 1.0
    return RopeScaling(
        "yarn",
        factor,
        original_max_position=metadata.get(f"{prefix}.original_context_length", int, context),
        beta_fast=number("yarn_beta_fast", 32.0),
        beta_slow=number("yarn_beta_slow", 1.0),
        attention_factor=derived * number("attn_factor", 1.0) * number("yarn_attn_factor", 1.0),
    )
