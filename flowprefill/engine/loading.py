"""From checkpoints and settings to native models and plans; used by devices and LocalWorker."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from flowprefill.config import Granularity
from flowprefill.errors import CheckpointError
from flowprefill.models.checkpoint import Progress, block_bytes
from flowprefill.models.graph import ModelGraph
from flowprefill.models.model_config import ModelConfig
from flowprefill.scheduling.cost_model import MachineRates, ModelShape, corrected
from flowprefill.scheduling.operator_rates import NONE, Corrections


def undisturbed(corrections: Corrections, is_exclusive: bool) -> Corrections:
    """Return the corrections to plan segments by.

    Args:
        is_exclusive: whether no other process uses the device. Then it is as slow as it was
            measured to be, and segments planned by its calibration would be too long. Where others
            use the cores too, they make segments longer without the work being more, and shorter
            segments would only add to that: by what all operators are slower is left out.
    """
    others = 1.0 if is_exclusive else max(min(corrections), 1.0)
    return Corrections(*(factor / others for factor in corrections))


def plan_options(
    native: Any, granularity: Granularity, rates: MachineRates, corrections: Corrections = NONE
) -> Any:
    """Return the planner's options: how to cut, and how fast this machine is.

    Args:
        native: the module whose runs they are for.
        corrections: true over calibrated time of operators; segments are planned by it.
    """
    now = corrected(rates, corrections)
    return native.PlanOptions(
        granularity=granularity.kind,
        budget_s=granularity.budget_s or 2e-3,
        chunk_tokens=granularity.chunk_tokens or 512,
        rates=native.MachineRates(
            gemm_flops_per_s=now.gemm_flops_per_s,
            attention_flops_per_s=now.attention_flops_per_s,
            weight_bytes_per_s=now.weight_bytes_per_s,
            cache_bytes_per_s=rates.weight_bytes_per_s / corrections.cache,
        ),
    )


class WeightSource(Protocol):
    """What has a model's graph and its weights; see Checkpoint."""

    @property
    def config(self) -> ModelConfig:
        """What the graph was built from."""
        ...

    @property
    def graph(self) -> ModelGraph:
        """The model."""
        ...

    def weights(
        self, progress: Progress | None = None, in_blocks: Collection[str] = ()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight once, by the names of the graph's sources."""
        ...


class Loadable(Protocol):
    """A native model that takes its weights."""

    def load(self, name: str, values: npt.NDArray[np.float32]) -> None:
        """Take one tensor by its canonical name."""

    def finish(self) -> None:
        """Check that all have come."""


class KeepsBlocks(Loadable, Protocol):
    """One that can keep weights as they are quantised."""

    def load_blocks(self, name: str, rows: npt.NDArray[np.uint8]) -> None:
        """Take one that was announced to come in quantised blocks, [rows, bytes of a row]."""


def fill_model(
    model: Loadable,
    checkpoint: WeightSource,
    progress: Progress | None = None,
    in_blocks: Collection[str] = (),
) -> None:
    """Read a checkpoint's weights into a native model, one tensor at a time.

    Args:
        in_blocks: tensors that the model keeps as they are quantised; it is a KeepsBlocks then.
        progress: called with bytes done and bytes in all.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape.
        MemoryError: this machine's is too little to read one.
    """
    try:
        for name, tensor in checkpoint.weights(progress, in_blocks):
            if name in in_blocks:
                cast("KeepsBlocks", model).load_blocks(name, tensor.numpy())
            else:
                model.load(name, np.ascontiguousarray(tensor.float().numpy()))
        model.finish()
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # so torch says it
            raise MemoryError from None
        raise


def model_shape(
    graph: ModelGraph,
    dtype: str,
    quantization: str = "none",
    formats: Mapping[str, str] | None = None,
) -> ModelShape:
    """Return the counts of work the cost model needs; a multiply-add is two operations.

    Args:
        quantization: of the device; int8: all weights of products in 8 bits; fp8: those of layers.
        formats: tensors that stay in their quantised blocks, canonical name -> type; not of fp8.
    """
    element_bytes = 2 if dtype == "bf16" else 4
    in_8_bits = {"int8": (True, False), "fp8": (True,)}.get(quantization, ())
    elements = {True: 0.0, False: 0.0}  # that a row computes: of the layers, outside of them
    weight_bytes = {True: 0.0, False: 0.0}
    expert_bytes, expert_share = 0.0, 1.0
    for operator, weight in graph.product_weights():
        in_layer = operator.layer >= 0
        for part in weight.parts:
            count = weight.columns * part.rows
            kind = (formats or {}).get(part.source) if quantization != "fp8" else None
            own_bytes = 1 if in_layer in in_8_bits else element_bytes
            elements[in_layer] += count * operator.share
            part_bytes = count * (block_bytes(kind) if kind else own_bytes)
            weight_bytes[in_layer] += part_bytes
            if operator.experts:
                expert_bytes, expert_share = expert_bytes + part_bytes, operator.share
    return ModelShape(
        linear_flops_per_token=2.0 * elements[True],
        weight_bytes=weight_bytes[True],
        attention_flops_per_pair=4.0 * graph.num_heads * graph.head_dim * graph.num_layers,
        head_flops_per_sequence=2.0 * elements[False],
        head_bytes=weight_bytes[False],
        cache_bytes_per_token=2.0
        * graph.num_kv_heads
        * graph.head_dim
        * graph.num_layers
        * element_bytes,
        expert_bytes=expert_bytes,
        expert_share=expert_share,
    )
