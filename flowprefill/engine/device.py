"""What the engine needs of a device and of its native module, as protocols.

The native modules have the same classes for the same things. cpu_device.py and cuda_device.py
implement Device; device_choice.py chooses one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from flowprefill.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flowprefill.config import EngineConfig, Granularity
    from flowprefill.engine.worker import RunHandle
    from flowprefill.models.checkpoint import Checkpoint
    from flowprefill.models.model_config import ModelConfig
    from flowprefill.native import _core

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ProbeSizes:
    """How much work tells a device's speed: with less of it, a wide device is half idle.

    Attributes:
        tokens: rows of one probe.
        context: tokens in the cache that those rows attend to.
        fills_context: whether the context is computed first. On a GPU zeros are faster than keys
            and values as they come, since they switch no wires and so take less power.
    """

    tokens: int
    context: int
    fills_context: bool = False


class NativeExecutor(Protocol):
    """The thread that owns the device. Runs are those of the same module."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def dispatch(self, run: Any) -> Any: ...
    def cancel(self, run: Any) -> bool: ...
    def suspend(self, run: Any) -> bool: ...
    def pop_events(self) -> list[Any]: ...
    def timeline(self, since: int = 0) -> _core.TimelineSnapshot: ...
    def operator_times(self, run: Any, rates: Any) -> list[_core.OperatorTuple]: ...
    def stats(self) -> _core.ExecutorStats: ...
    @property
    def event_fd(self) -> int: ...


class NativeModel(Protocol):
    """Weights and KV cache on one device."""

    def load(self, name: str, values: FloatArray) -> None: ...
    def finish(self) -> None: ...
    def allocate_cache(self, block_tokens: int, blocks: int) -> None: ...
    def bytes_per_block(self, block_tokens: int) -> int: ...
    def zero_blocks(self, blocks: list[int]) -> None: ...
    def make_run(self, id: int, batch: Any, plan: Any) -> RunHandle: ...
    @property
    def weight_bytes(self) -> int: ...


class Device(Protocol):
    """Where a model runs, and how its parts are made.

    Attributes:
        native: the module with its classes: `Batch`, `PlanOptions` and so on.
        name: ``cpu`` or ``cuda:N``.
        reason: why this one, in words.
        dtype: what it computes in: ``bf16`` or ``f32``.
        quantization: how weights of products are kept, as the settings have it; GPUs: ``none`` or
            ``fp8``.
        max_model_len: longest prompt plus output taken unless the settings ask for more; 0: the
            model's own.
        max_running: most sequences in one decode step unless the settings say otherwise.
        is_exclusive: whether no other process computes on it, so that a work which takes longer
            than predicted is slower, not disturbed.
        probe_sizes: of calibration.
        granularity: where the settings say ``auto``.
    """

    native: Any
    name: str
    reason: str
    dtype: str
    quantization: str
    threads: int
    max_model_len: int
    max_running: int
    is_exclusive: bool
    probe_sizes: ProbeSizes
    granularity: Granularity

    def make_model(self, checkpoint: Checkpoint) -> NativeModel:
        """Make an empty model.

        Raises:
            ConfigError: the device cannot run this model, or its memory is too small.
        """

    def no_memory(self, checkpoint: Checkpoint) -> ConfigError:
        """Return the error for weights for which there was no memory of the machine's."""

    def block_formats(self, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Return the tensors that stay in their quantised blocks: canonical name -> type."""

    def cache_bytes(self, model: Any) -> int:
        """Return the memory for the KV cache of a loaded model, where the settings name none."""

    def start_executor(self, model: Any, plan: Any | None) -> NativeExecutor:
        """Make and start the executor of a model whose cache has been allocated.

        Args:
            plan: the planner's options that runs are likely to have, to prepare for.

        Raises:
            ConfigError: the device refused.
        """

    def workspace_bytes(self, model: Any) -> int:
        """Return the memory that live runs hold outside the KV cache."""

    def identity(self) -> Mapping[str, Any]:
        """Return what the speed of a model depends on; calibration is kept by it."""

    def describe(self) -> dict[str, Any]:
        """Return device, reason and what else names it, in words."""


def longest_of(usual: int, config: EngineConfig, model_config: ModelConfig) -> int:
    """Return the longest prompt plus output, tokens.

    Args:
        usual: longest taken unless the settings ask for more; 0: the model's own.

    Raises:
        ConfigError: the settings ask for more than the model has.
    """
    limit, wanted = model_config.max_position, config.max_model_len
    if wanted > limit:
        raise ConfigError(
            f"max_model_len: got {wanted}, expected at most {limit}, the model's own",
            param="max_model_len",
        )
    return wanted or min(limit, usual or limit)
