"""Joins checkpoints and settings to the native modules: loading, plans; used by the engine."""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flowprefill import _core
from flowprefill.config import Granularity
from flowprefill.errors import CheckpointError, ConfigError
from flowprefill.models.checkpoint import Checkpoint, Progress
from flowprefill.models.graph import ModelGraph
from flowprefill.scheduling.cost_model import MachineRates, ModelShape

STEP_OVERHEAD_S = 5e-6  # of one step of a segment; a run's own overhead is in MachineRates


def slowdown_of(correction: float, is_exclusive: bool) -> float:
    """Return the slowdown to plan segments by, in steps of 0.1: few different plans are made.

    Args:
        correction: measured over predicted time of late.
        is_exclusive: whether nobody else uses the device. Then it is as slow as it was measured to
            be, and segments planned by its calibration would be too long. Where others use the
            cores too, they make segments longer without the work being more, and shorter segments
            would only add to that: no slowdown over 1.
    """
    return max(round(correction if is_exclusive else min(correction, 1.0), 1), 0.1)


def native_plan(
    granularity: Granularity, rates: MachineRates, slowdown: float = 1.0
) -> dict[str, Any]:
    """Return what the planner needs: how to cut, and how fast this machine is.

    Args:
        slowdown: measured over predicted time of late; segments are planned by it.
    """
    return {
        "granularity": granularity.kind,
        "budget_s": granularity.budget_s or 2e-3,
        "chunk_tokens": granularity.chunk_tokens or 512,
        "gemm_flops_per_s": rates.gemm_flops_per_s / slowdown,
        "attention_flops_per_s": rates.attention_flops_per_s / slowdown,
        "weight_bytes_per_s": rates.weight_bytes_per_s / slowdown,
        "step_overhead_s": STEP_OVERHEAD_S,
    }


def resolve_dtype(dtype: str) -> str:
    """Return ``bf16`` or ``f32``; ``auto`` is bf16 where the processor multiplies it natively."""
    has_bf16 = _core.has_bf16_gemm()
    if dtype == "auto":
        return "bf16" if has_bf16 else "f32"
    if dtype == "bf16" and not has_bf16:
        raise ConfigError(
            "dtype: got 'bf16', but this processor does not multiply bf16 natively, expected 'f32'",
            param="dtype",
        )
    return dtype


def resolve_threads(threads: int) -> int:
    """Return the compute threads: those asked for, or one per core this process may use."""
    return threads or len(os.sched_getaffinity(0))


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
        model = _core.Model(checkpoint.graph, dtype, threads)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    fill_model(model, checkpoint, progress)
    return model


def model_shape(graph: ModelGraph, dtype: str) -> ModelShape:
    """Return the counts of work the cost model needs; a multiply-add is two operations."""
    element_bytes = 2 if dtype == "bf16" else 4
    elements = {True: 0, False: 0}  # of the layers, and outside of them
    for operator, count in graph.products():
        elements[operator.layer >= 0] += count
    return ModelShape(
        linear_flops_per_token=2.0 * elements[True],
        weight_bytes=float(elements[True] * element_bytes),
        attention_flops_per_pair=4.0 * graph.num_heads * graph.head_dim * graph.num_layers,
        head_flops_per_sequence=2.0 * elements[False],
        head_bytes=float(elements[False] * element_bytes),
    )
