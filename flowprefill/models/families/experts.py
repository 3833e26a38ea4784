"""What GGUF files of mixtures of experts have in common; read by the families that have one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowprefill.models.model_config import bad_field

if TYPE_CHECKING:
    from flowprefill.models.gguf_metadata import GgufMetadata

# Keys of mixtures that are computed otherwise.
_REFUSED = ("expert_shared_count", "expert_group_count", "leading_dense_block_count")
_SOFTMAX = 1  # expert_gating_func


def read_gguf_experts(
    metadata: GgufMetadata, architecture: str, default_size: int
) -> dict[str, Any]:
    """Read ModelConfig's fields about experts; empty: the file has none.

    Args:
        default_size: intermediate size of an expert where the file does not say.

    Raises:
        CheckpointError: a key says that they are computed otherwise.
    """

    def integer(key: str, default: int | None = None) -> int:
        return int(metadata.get(f"{architecture}.{key}", int, default))

    count = integer("expert_count", 0)
    if not count:
        return {}
    for key in (f"{architecture}.{key}" for key in _REFUSED):
        if metadata.values.get(key):
            raise bad_field(key, metadata.values[key], "0")
    if (gating := integer("expert_gating_func", _SOFTMAX)) not in (0, _SOFTMAX):
        raise bad_field(f"{architecture}.expert_gating_func", gating, "1: softmax")
    scale = float(metadata.get(f"{architecture}.expert_weights_scale", (float, int), 1.0))
    if scale not in (0.0, 1.0):
        raise bad_field(f"{architecture}.expert_weights_scale", scale, "1")
    return {
        "num_experts": count,
        "experts_per_token": integer("expert_used_count"),
        "expert_size": integer("expert_feed_forward_length", default_size),
    }
