"""The choice of a device by the setting `device`, and the model loaded there; for LocalWorker."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowprefill.config import EngineConfig
from flowprefill.engine.cpu_device import CpuDevice
from flowprefill.engine.cuda_device import CudaDevice
from flowprefill.engine.loading import fill_model
from flowprefill.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from flowprefill.engine.device import Device, NativeModel
    from flowprefill.models.checkpoint import Checkpoint, Progress

log = logging.getLogger(__name__)

NOT_BUILT = (
    "this build has no module for GPUs; to build it: FLOWPREFILL_CUDA=1 (docs/configuration.md)"
)


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


def choose_device(setting: str, dtype: str = "auto", quantization: str = "auto") -> DeviceChoice:
    """Decide where to run.

    Args:
        setting: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, as EngineConfig checked it.
        dtype, quantization: as the settings; GPUs compute bf16 only.

    Raises:
        ConfigError: a GPU is asked for and cannot be used; names what is missing.
    """
    if setting == "cpu":
        return DeviceChoice("cpu", "the setting device is 'cpu'")
    if setting == "auto" and dtype == "f32":
        return DeviceChoice("cpu", "dtype is 'f32', which GPUs do not compute here")
    if setting == "auto" and quantization not in ("auto", "none", "fp8"):
        return DeviceChoice(
            "cpu", f"quantization is {quantization!r}, which GPUs do not compute here"
        )
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
    choice = choose_device(config.device, config.dtype, config.quantization)
    if choice.module is None:
        return CpuDevice(config, choice.reason)
    return CudaDevice(config, choice.module, choice.index, choice.reason)


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
        if config.device != "auto" or config.quantization == "fp8":  # which the CPU has not
            raise
        device = CpuDevice(config, error.message)
        model = device.make_model(checkpoint)
    if config.device == "auto":
        log.info("device %s: %s", device.name, device.reason)
    try:
        fill_model(model, checkpoint, progress, device.block_formats(checkpoint))
    except MemoryError:
        raise device.no_memory(checkpoint) from None
    return device, model
