"""A stand-in of flowprefill._cuda whose GPUs are described by a test and whose models are _core's.

For tests of the choice of a device, of the engine's wiring and of the bench; tests/device has the
real module on a double of the CUDA runtime.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, ClassVar

import pytest

from flowprefill import _core

GIB = 1 << 30
USABLE = (True, "Test GPU, compute capability 9.0")


class Model:
    """The model of _core in float32; keeps the options it was made with."""

    made: ClassVar[list[dict[str, Any]]] = []
    library_failure = ""
    gemm_cache_failure = ""
    capability = (9, 0)

    def __init__(self, config: dict[str, Any], options: dict[str, Any]) -> None:
        self.made.append(options)
        self.inner = _core.Model(config, "f32", 1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def make_run(self, *arguments: Any, **options: Any) -> Any:
        return self.inner.make_run(*arguments, **options)

    def lane_bytes(self, block_tokens: int) -> int:
        return 2 * GIB

    def lane_report(self) -> dict[str, int]:
        return {"device_spill_bytes": 0, "pinned_spill_bytes": 0}


class RefusingModel(Model):
    """A model that no kernel takes."""

    def __init__(self, config: dict[str, Any], options: dict[str, Any]) -> None:
        raise ValueError("head_dim: got 16, expected 64, 96 or 128")


def install(
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[tuple[bool, str]],
    free_bytes: int = 4 * GIB,
    model: type[Model] = Model,
) -> None:
    """Make `import flowprefill._cuda` find a module with these GPUs."""

    def availability(device: int = 0) -> tuple[bool, str]:
        if not gpus:
            return False, "no NVIDIA driver: libcuda.so.1 cannot be loaded"
        if not 0 <= device < len(gpus):
            return False, f"no GPU with this number: there are {len(gpus)}"
        return gpus[device]

    def device_info(device: int = 0) -> dict[str, Any]:
        return {
            "name": "Test GPU", "compute_capability": model.capability, "multiprocessors": 132,
            "memory_bytes": 80 * GIB, "free_bytes": free_bytes,
            "driver_version": "13.0", "runtime_version": "13.0",
        }  # fmt: skip

    module: Any = ModuleType("flowprefill._cuda")
    module.architectures = "80-real;90-real"
    module.device_count = lambda: len(gpus)
    module.availability = availability
    module.device_info = device_info
    module.Model = model
    module.Executor = lambda model, plan=None: _core.Executor(1)
    for name in (
        "Batch", "BatchSequence", "DeviceSampling", "MachineRates", "PlanOptions", "has_logits",
        "logits", "sampled",
    ):  # fmt: skip
        setattr(module, name, getattr(_core, name))
    monkeypatch.setattr(model, "made", [])
    monkeypatch.setitem(sys.modules, "flowprefill._cuda", module)


def remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import flowprefill._cuda` fail as where it was not built."""
    monkeypatch.setitem(sys.modules, "flowprefill._cuda", None)
