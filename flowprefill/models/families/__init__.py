"""Model families: each file reads one kind of decoder's config.json and builds its graph.

``register`` adds a family of one's own; docs/families.md shows how to write one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowprefill.models.families import (
    gemma,
    glm,
    granite,
    llama,
    mixture,
    olmo2,
    phi3,
)
from flowprefill.models.families.family import Family, GgufForm
from flowprefill.models.graph import ModelGraph
from flowprefill.models.hf_config import HfConfig
from flowprefill.models.model_config import ModelConfig, bad_field

__all__ = [
    "Family",
    "GgufForm",
    "build_graph",
    "family_of",
    "family_of_gguf",
    "read_config",
    "register",
]

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make checkpoints of a family loadable, in this process.

    Raises:
        ValueError: another family has this model_type.
    """
    known = _FAMILIES.setdefault(family.model_type, family)
    if known is not family:
        raise ValueError(
            f"model_type: got {family.model_type!r}, expected one that no family has yet"
        )


def family_of(config: ModelConfig) -> Family:
    """Return the family of a configuration."""
    return _FAMILIES[config.family]


def family_of_gguf(architecture: str) -> Family:
    """Return the family of a GGUF file's ``general.architecture``.

    Raises:
        CheckpointError: no family has files of this architecture.
    """
    known = {family.gguf.architecture: family for family in _FAMILIES.values() if family.gguf}
    if architecture not in known:
        raise bad_field("general.architecture", architecture, "one of " + ", ".join(known))
    return known[architecture]


def build_graph(config: ModelConfig) -> ModelGraph:
    """Return the graph of a model by its family."""
    return family_of(config).build(config)


def read_config(values: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed ``config.json``, as transformers 4 or 5 writes it.

    Raises:
        CheckpointError: an architecture, activation, rope kind or value that is not supported;
            names the field, what it is and what is allowed.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise bad_field("model_type", model_type, "one of " + ", ".join(_FAMILIES))
    family = _FAMILIES[model_type]
    architectures = values.get("architectures")
    if architectures and (
        not isinstance(architectures, list) or family.architecture not in architectures
    ):
        raise bad_field("architectures", architectures, f"a list with {family.architecture!r}")
    return family.read(HfConfig(values))


for _module in (llama, gemma, phi3, glm, olmo2, granite, mixture):
    for _family in _module.FAMILIES:
        register(_family)
