"""Model families: each file builds the graph of one kind of decoder from its configuration."""

from __future__ import annotations

from collections.abc import Callable

from flowprefill.models.families.llama import build as build_llama
from flowprefill.models.graph import ModelGraph
from flowprefill.models.model_config import ModelConfig

BUILDERS: dict[str, Callable[[ModelConfig], ModelGraph]] = {
    "llama": build_llama,
    "mistral": build_llama,
    "qwen2": build_llama,
    "qwen3": build_llama,
}


def build_graph(config: ModelConfig) -> ModelGraph:
    """Return the graph of a model by its family."""
    return BUILDERS[config.family](config)
