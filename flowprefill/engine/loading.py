"""From checkpoints and settings to native models and plans; used by devices and LocalWorker."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flowprefill import _core
from flowprefill.config import Granularity
from flowprefill.errors import CheckpointError
from flowprefill.models.checkpoint import Checkpoint, Progress
from flowprefill.models.model_config import ModelConfig, rope_inverse_frequencies
from flowprefill.scheduling.cost_model import MachineRates, ModelShape


def native_config(config: ModelConfig) -> dict[str, Any]:
    """Return the model's shape as the native side takes it; rotary scaling is already applied."""
    frequencies, attention_scale = rope_inverse_frequencies(config)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
        "head_dim", "rms_eps", "tie_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm",
    )  # fmt: skip
    values: dict[str, Any] = {name: getattr(config, name) for name in names}
    values["windows"] = [config.sliding_window if on else 0 for on in config.sliding_layers]
    values["inverse_frequencies"] = [float(f) for f in frequencies]
    values["rope_attention_scale"] = float(attention_scale)
    return values


def plan_options(
    native: Any, granularity: Granularity, rates: MachineRates, slowdown: float = 1.0
) -> Any:
    """Return the planner's options: how to cut, and how fast this machine is.

    Args:
        native: the module whose runs they are for.
        slowdown: measured over predicted time of late; segments are planned by it.
    """
    return native.PlanOptions(
        granularity=granularity.kind,
        budget_s=granularity.budget_s or 2e-3,
        chunk_tokens=granularity.chunk_tokens or 512,
        rates=native.MachineRates(
            gemm_flops_per_s=rates.gemm_flops_per_s / slowdown,
            attention_flops_per_s=rates.attention_flops_per_s / slowdown,
            weight_bytes_per_s=rates.weight_bytes_per_s / slowdown,
        ),
    )


class Loadable(Protocol):
    """A native model that takes its weights."""

    def load(self, name: str, values: npt.NDArray[np.float32]) -> None:
        """Take one tensor by its canonical name."""

    def finish(self) -> None:
        """Check that all have come."""


def fill_model(model: Loadable, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
    """Read a checkpoint's weights into a native model, one tensor at a time.

    Args:
        progress: called with bytes done and bytes in all.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape.
    """
    try:
        for name, tensor in checkpoint.weights(progress):
            model.load(name, np.ascontiguousarray(tensor.float().numpy()))
        model.finish()
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def load_model(
    checkpoint: Checkpoint, dtype: str, threads: int, progress: Progress | None = None
) -> _core.Model:
    """Make a model on the CPU and fill it: see fill_model.

    Args:
        dtype: ``bf16`` or ``f32``.
    """
    try:
        model = _core.Model(native_config(checkpoint.config), dtype, threads)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    fill_model(model, checkpoint, progress)
    return model


def model_shape(config: ModelConfig, dtype: str) -> ModelShape:
    """Return the counts of work the cost model needs; a multiply-add is two operations."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.num_layers * (hidden * (q + 2 * kv) + q * hidden + 3 * hidden * inner)
    element_bytes = 2 if dtype == "bf16" else 4
    return ModelShape(
        linear_flops_per_token=2.0 * weights,
        weight_bytes=float(weights * element_bytes),
        attention_flops_per_pair=4.0 * q * config.num_layers,
        head_flops_per_sequence=2.0 * hidden * config.vocab_size,
        head_bytes=float(hidden * config.vocab_size * element_bytes),
    )
