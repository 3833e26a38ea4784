"""Family: what makes one kind of decoder; the registry in this folder's __init__ holds them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from flowprefill.models.families.decoder import build_decoder
from flowprefill.models.graph import ModelGraph
from flowprefill.models.hf_config import HfConfig
from flowprefill.models.model_config import ModelConfig
from flowprefill.models.rope import rotate_half_rows

if TYPE_CHECKING:
    from flowprefill.models.gguf_metadata import GgufMetadata

Arrange = Callable[[ModelConfig, str, torch.Tensor], torch.Tensor]


def as_stored(_config: ModelConfig, _name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Leave a tensor as its file has it."""
    return tensor


def rotate_half_heads(config: ModelConfig, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Reorder the rows of q and k, weights and biases, for rows that turn as halves.

    Args:
        name: canonical; other weights stay as they are.
    """
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    kind = name.rpartition(".")[2].removesuffix("_bias")
    return rotate_half_rows(tensor, heads[kind], config.rotary_dim) if kind in heads else tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufForm:
    """How GGUF files hold a family.

    Attributes:
        architecture: their ``general.architecture``, which is the prefix of their keys, too.
        read: given the header and the fields of ModelConfig that every file has, returns those that
            are to be added or changed; raises CheckpointError.
        arrange: as Family.arrange, for GGUF files.
        has_experts: files with a mixture of experts are read, too.
    """

    architecture: str
    read: Callable[[GgufMetadata, Mapping[str, Any]], dict[str, Any]]
    arrange: Arrange = as_stored
    has_experts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of decoder.

    Attributes:
        model_type: what config.json calls it; ``ModelConfig.family`` of its models.
        architecture: the class in config.json's ``architectures``.
        read: makes the configuration from config.json; raises CheckpointError.
        build: makes the graph; its weights are parts of tensors by canonical names.
        hf_names: Hugging Face's names where they are not those of weight_names.py: canonical name
            inside a layer -> name without the layer's prefix.
        arrange: changes a tensor that was read, e.g. the order of its rows: given the
            configuration, the canonical name and the tensor. Hugging Face folders only.
        gguf: None: no GGUF files of it are read.
    """

    model_type: str
    architecture: str
    read: Callable[[HfConfig], ModelConfig]
    build: Callable[[ModelConfig], ModelGraph] = build_decoder
    hf_names: Mapping[str, str] = field(default_factory=dict)
    arrange: Arrange = as_stored
    gguf: GgufForm | None = None
