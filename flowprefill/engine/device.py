"""Devices: what the engine needs of one, the choice by the setting `device`, and the CPU.

The native modules have the same classes for the same things; these protocols are what the engine
knows of them. `cuda_device.py` has the other device.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from flowprefill import _core
from flowprefill.config import EngineConfig
from flowprefill.engine.calibration import ProbeSizes
from flowprefill.engine.native import (
    fill_model,
    resolve_dtype,
    resolve_threads,
)
from flowprefill.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from flowprefill.models.checkpoint import Checkpoint, Progress
    from flowprefill.models.model_config import ModelConfig

log = logging.getLogger(__name__)

GIB = 1 << 30
CPU_CACHE_GIB = 1.0  # of the KV cache, where nothing is said
NOT_BUILT = (
    "this build has no module for GPUs; to build it: FLOWPREFILL_CUDA=1 (docs/configuration.md)"
)

FloatArray = npt.NDArray[np.float32]


class NativeRun(Protocol):
    """One execution of a program; its device's module made it and takes it back."""

    @property
    def id(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def error(self) -> str: ...
    @property
    def cursor(self) -> int: ...
    @property
    def num_segments(self) -> int: ...
    def accounting(self) -> dict[str, Any]: ...


class NativeExecutor(Protocol):
    """The thread that owns the device. Runs are those of the same module."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def dispatch(self, run: Any) -> Any: ...
    def cancel(self, run: Any) -> bool: ...
    def suspend(self, run: Any, yields: bool = False) -> bool: ...
    def pop_events(self) -> list[Any]: ...
    def timeline(self, since: int = 0) -> tuple[list[tuple[Any, ...]], int, int]: ...
    def stats(self) -> dict[str, Any]: ...
    @property
    def event_fd(self) -> int: ...


class NativeModel(Protocol):
    """Weights and KV cache on one device."""

    def load(self, name: str, values: FloatArray) -> None: ...
    def finish(self) -> None: ...
    def allocate_cache(self, block_tokens: int, blocks: int) -> None: ...
    def bytes_per_block(self, block_tokens: int) -> int: ...
    def zero_blocks(self, blocks: list[int]) -> None: ...
    def make_run(
        self,
        id: int,
        tokens: npt.NDArray[np.int32],
        sequences: list[tuple[int, int, npt.NDArray[np.int32]]],
        plan: dict[str, Any],
    ) -> NativeRun: ...
    @property
    def weight_bytes(self) -> int: ...


class Device(Protocol):
    """Where a model runs, and how its parts are made.

    Attributes:
        name: ``cpu`` or ``cuda:N``.
        reason: why this one, in words.
        dtype: what it computes in: ``bf16`` or ``f32``.
        max_model_len: longest prompt plus output taken unless the settings ask for more; 0: the
            model's own.
        chooses_tokens: whether runs can choose the next tokens themselves: `make_run` then takes
            `sampling` and `fetch_logits`.
        is_exclusive: whether nobody else computes on it, so that a work which takes longer than
            predicted is slower, not disturbed.
        probe_sizes: of calibration.
    """

    name: str
    reason: str
    dtype: str
    threads: int
    max_model_len: int
    chooses_tokens: bool
    is_exclusive: bool
    probe_sizes: ProbeSizes

    def make_model(self, checkpoint: Checkpoint) -> NativeModel:
        """Make an empty model.

        Raises:
            ConfigError: the device cannot run this model, or its memory is too small.
        """

    def cache_bytes(self, model: Any) -> int:
        """Return the memory for the KV cache of a loaded model, where the settings name none."""

    def start_executor(self, model: Any, plan: dict[str, Any] | None) -> NativeExecutor:
        """Make and start the executor of a model whose cache has been allocated.

        Args:
            plan: the planner's options that runs are likely to have, to prepare for.

        Raises:
            ConfigError: the device refused.
        """

    def outcomes(self, run: Any) -> FloatArray | list[int]:
        """Return a finished run's logits, [sequences, vocab], or the tokens it has chosen."""

    def workspace_bytes(self, model: Any) -> int:
        """Return the memory that live runs hold beside the KV cache."""

    def identity(self) -> Mapping[str, Any]:
        """Return what the speed of a model depends on; calibration is kept by it."""

    def describe(self) -> dict[str, Any]:
        """Return device, reason and what else names it, in words."""


class CpuDevice:
    """The processor: compute threads of this process; see Device."""

    name = "cpu"
    max_model_len = 0
    chooses_tokens = False
    is_exclusive = False
    probe_sizes = ProbeSizes(tokens=256, context=3072)

    def __init__(self, config: EngineConfig, reason: str) -> None:
        """Settle element type and threads.

        Raises:
            ConfigError: bf16 on a processor that does not multiply it.
        """
        self.reason = reason
        self.dtype = resolve_dtype(config.dtype)
        self.threads = resolve_threads(config.threads)
        self._background = config.background

    def make_model(self, checkpoint: Checkpoint) -> _core.Model:
        """Make an empty model; any number of tokens fits."""
        try:
            return _core.Model(checkpoint.graph, self.dtype, self.threads)
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    def cache_bytes(self, model: _core.Model) -> int:
        """Return a fixed size: what else wants the machine's memory cannot be known."""
        del model
        return int(CPU_CACHE_GIB * GIB)

    def start_executor(self, model: _core.Model, plan: dict[str, Any] | None) -> _core.Executor:
        """Start an executor; it runs any model's runs, and has nothing to prepare."""
        del model, plan
        executor = _core.Executor(self.threads, self._background)
        executor.start()
        return executor

    def outcomes(self, run: _core.Run) -> FloatArray:
        """Return a view of the run's logits."""
        return _core.logits(run)

    def workspace_bytes(self, model: _core.Model) -> int:
        """Return the workspaces of this process."""
        del model
        return _core.live_workspace_bytes()

    def identity(self) -> Mapping[str, Any]:
        """Return threads, instruction set and cores."""
        return {
            "threads": self.threads,
            "isa": _core.row_kernel_isa(),
            "cores": len(os.sched_getaffinity(0)),
        }

    def describe(self) -> dict[str, Any]:
        """Return device, reason, threads and instruction set."""
        return {
            "device": self.name,
            "reason": self.reason,
            "dtype": self.dtype,
            "threads": self.threads,
            "isa": _core.row_kernel_isa(),
        }


# ---- the choice --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """A device and why.

    Attributes:
        name: ``cpu`` or ``cuda:N``.
        reason: in words; names the GPU, or what is missing for one.
        module: the native module of GPUs; None: the CPU.
        index: of the GPU.
    """

    name: str
    reason: str
    module: ModuleType | None = None
    index: int = 0


def cuda_module() -> tuple[ModuleType | None, str]:
    """Return the native module for GPUs, or None and why there is none."""
    try:
        import flowprefill._cuda as module
    except ModuleNotFoundError:
        return None, NOT_BUILT
    except ImportError as error:
        return None, f"the module for GPUs cannot be loaded: {error}"
    return module, ""


def find_gpu(index: int | None) -> DeviceChoice:
    """Return this GPU, or with None the first that can be used; name ``cpu`` if there is none."""
    module, reason = cuda_module()
    if module is None:
        return DeviceChoice("cpu", reason)
    candidates = range(max(module.device_count(), 1)) if index is None else (index,)
    reasons = []
    for candidate in candidates:
        is_usable, found = module.availability(candidate)
        if is_usable:
            return DeviceChoice(f"cuda:{candidate}", found, module, candidate)
        reasons.append(found)
    return DeviceChoice("cpu", "; ".join(dict.fromkeys(reasons)))


def choose_device(setting: str, dtype: str = "auto") -> DeviceChoice:
    """Decide where to run.

    Args:
        setting: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, as EngineConfig checked it.
        dtype: as the setting; GPUs compute bf16 only.

    Raises:
        ConfigError: a GPU is asked for and cannot be used; names what is missing.
    """
    if setting == "cpu":
        return DeviceChoice("cpu", "the setting device is 'cpu'")
    if setting == "auto" and dtype == "f32":
        return DeviceChoice("cpu", "dtype is 'f32', which GPUs do not compute here")
    index = int(setting.partition(":")[2]) if ":" in setting else None
    choice = find_gpu(index)
    if setting == "auto" or choice.module is not None:
        return choice
    raise ConfigError(f"device: got {setting!r}, but {choice.reason}", param="device")


def open_device(config: EngineConfig) -> Device:
    """Return the device the settings choose.

    Raises:
        ConfigError: what is asked for cannot be had.
    """
    choice = choose_device(config.device, config.dtype)
    if choice.module is None:
        return CpuDevice(config, choice.reason)
    from flowprefill.engine.cuda_device import CudaDevice

    return CudaDevice(config, choice)


def open_model(
    config: EngineConfig, checkpoint: Checkpoint, progress: Progress | None = None
) -> tuple[Device, NativeModel]:
    """Choose the device and load the model there.

    With ``auto`` a model that the GPU cannot take goes to the CPU, and one line in the log says
    which device it is and why.

    Raises:
        CheckpointError: what is wrong with the model. ConfigError: what is asked for cannot be had.
    """
    device = open_device(config)
    try:
        model = device.make_model(checkpoint)
    except ConfigError as error:
        if config.device != "auto":
            raise
        device = CpuDevice(config, error.message)
        model = device.make_model(checkpoint)
    if config.device == "auto":
        log.info("device %s: %s", device.name, device.reason)
    fill_model(model, checkpoint, progress)
    return device, model


def longest_of(device: Device, config: EngineConfig, model_config: ModelConfig) -> int:
    """Return the longest prompt plus output, tokens.

    Raises:
        ConfigError: the settings ask for more than the model has.
    """
    limit, wanted = model_config.max_position, config.max_model_len
    if wanted > limit:
        raise ConfigError(
            f"max_model_len: got {wanted}, expected at most {limit}, the model's own",
            param="max_model_len",
        )
    return wanted or min(limit, device.max_model_len or limit)
