"""CudaDevice: a GPU as the engine sees it, by the module _cuda; made by `open_device`."""

from __future__ import annotations

import logging
import os
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowprefill.config import GIB, EngineConfig, Granularity
from flowprefill.engine.calibration import cache_folder
from flowprefill.engine.device import ProbeSizes, longest_of
from flowprefill.engine.host_memory import available, largest_tensor
from flowprefill.errors import ConfigError
from flowprefill.models.quantised_weights import E4M3
from flowprefill.scheduling import SchedulerSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flowprefill import _cuda
    from flowprefill.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)  # the first whose tensor cores multiply it
# Activations of the longest run lie in static lanes: a limit of 128k tokens, which few ask for,
# would take many GiB from the KV cache.
USUAL_MAX_MODEL_LEN = 32_768
CACHE_SHARE = 0.9  # of the memory left over; the rest is for the driver and fragmentation
GRAPH_BYTES = 1 * GIB  # of graphs at most; kept free


class CudaDevice:
    """One GPU; see Device."""

    max_model_len = USUAL_MAX_MODEL_LEN
    max_running = 256  # whose steps read weights once, and have graphs: see bucket.h
    is_exclusive = True
    # Enough blocks of threads for all multiprocessors, and context enough that attention counts.
    probe_sizes = ProbeSizes(tokens=2048, context=8192, fills_context=True)
    threads = 1  # the executor's own; the GPU computes
    # Blocks a short prompt for 0.6 ms on an H200 (docs/cuda-measured.md).
    granularity = Granularity("budget", budget_s=0.5e-3)

    def __init__(self, config: EngineConfig, module: Any, index: int, reason: str) -> None:
        """Settle the element type.

        Args:
            module: ``flowprefill._cuda``. index: of the GPU. reason: why this device, in words.

        Raises:
            ConfigError: f32 is asked for, or a quantization that this GPU does not compute.
        """
        self.name = f"cuda:{index}"
        if config.dtype == "f32":
            raise ConfigError(
                f"dtype: got 'f32', expected 'bf16' or 'auto' on {self.name}: GPUs compute bf16 "
                "only; device 'cpu' computes f32",
                param="dtype",
            )
        self.native: Any = module
        self._index = index
        self._info: dict[str, Any] = self.native.device_info(index)
        self.reason = reason
        self.dtype = "bf16"
        self.quantization = self._checked(config.quantization)
        self._config = config

    def _checked(self, quantization: str) -> str:
        """Return ``none`` or ``fp8``."""
        has_fp8 = self._info["compute_capability"] >= FP8_CAPABILITY
        if quantization in ("auto", "none"):
            return "none"
        if quantization == "fp8" and has_fp8:
            return "fp8"
        allowed = "'auto', 'none' or 'fp8'" if has_fp8 else "'auto' or 'none'"
        why = (
            f"its compute capability is {self._capability()}, FP8 is multiplied from 8.9 on"
            if quantization == "fp8"
            else f"only device 'cpu' has {quantization}"
        )
        raise ConfigError(
            f"quantization: got {quantization!r}, expected {allowed} on {self.name}: {why}",
            param="quantization",
        )

    def _capability(self) -> str:
        major, minor = self._info["compute_capability"]
        return f"{major}.{minor}"

    def block_formats(self, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Return the FP8 weights of layers that have a scale for each row, if they stay so."""
        return self._own_fp8(checkpoint) if self.quantization == "fp8" else {}

    def _own_fp8(self, checkpoint: Checkpoint) -> Mapping[str, str]:
        in_layers = {
            part.source
            for operator, weight in checkpoint.graph.product_weights()
            if operator.layer >= 0
            for part in weight.parts
        }
        formats = checkpoint.block_formats((E4M3,))
        return {name: kind for name, kind in formats.items() if name in in_layers}

    def _tell_of_fp8(self, checkpoint: Checkpoint, library_failure: str) -> None:
        """Say in the log what becomes of FP8 weights, where it may not be what is expected."""
        own = len(self._own_fp8(checkpoint))
        if self.quantization == "fp8":
            log.info("%s: %d tensors are FP8 as stored, others are rounded to it", self.name, own)
            if library_failure:
                log.warning(
                    "%s: FP8 is multiplied by kernels of bf16, which is slow: cuBLASLt is not "
                    "used (%s)",
                    self.name,
                    library_failure,
                )
        elif own and self._info["compute_capability"] >= FP8_CAPABILITY:
            log.info(
                "%s: the checkpoint's FP8 weights become bf16; quantization 'fp8' keeps them",
                self.name,
            )
        elif own:
            log.info(
                "%s: the checkpoint's FP8 weights become bf16: FP8 is multiplied from compute "
                "capability 8.9 on, this is %s",
                self.name,
                self._capability(),
            )

    def make_model(self, checkpoint: Checkpoint) -> _cuda.Model:
        """Take the memory of the weights; the lanes will hold the longest prompt there can be."""
        settings = self._config
        config = checkpoint.config
        longest = longest_of(self.max_model_len, settings, config)
        folder = cache_folder(settings) if settings.calibrate else None
        most_running = settings.max_running or self.max_running
        most_tokens = max(longest, settings.max_batch_tokens, most_running)
        if settings.calibrate:
            most_tokens = max(most_tokens, self.probe_sizes.tokens)
        options = {
            "device": self._index,
            "max_tokens": most_tokens,
            "max_sequences": max(most_running, SchedulerSettings().max_batch_jobs),
            "max_context": config.max_position,
            "graph_bytes": GRAPH_BYTES,
            "run_ahead": settings.run_ahead,
            "measures_gemms": settings.calibrate,
            "gemm_cache_path": str(folder / "gemm-choices") if folder else "",
            "cublas_lt_libraries": cublas_lt_libraries(self.native, self._index),
            "attention": os.environ.get("FLOWPREFILL_CUDA_ATTENTION") or "auto",
            "quantizes_fp8": self.quantization == "fp8",
            "fp8_sources": list(self.block_formats(checkpoint)),
        }
        try:
            model: _cuda.Model = self.native.Model(checkpoint.graph, options)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"{self.name}: {error}", param="device") from None
        self._tell_of_fp8(checkpoint, model.library_failure)
        return model

    def no_memory(self, checkpoint: Checkpoint) -> ConfigError:
        """Return the error for weights that this machine's memory is too small to read."""
        largest, room = largest_tensor(checkpoint.graph), available()[0]
        message = (
            f"memory: reading the weights takes a few times the {largest / GIB:.2f} GiB of their "
            f"largest on this machine; {room.bytes / GIB:.2f} GiB are available ({room.bound})"
        )
        return ConfigError(message, param="device")

    def cache_bytes(self, model: _cuda.Model) -> int:
        """Return a share of what is free once weights, lanes and graphs have theirs.

        Raises:
            ConfigError: nothing is.
        """
        free: int = self.native.device_info(self._index)["free_bytes"]
        lanes = model.lane_bytes(self._config.block_tokens)
        left = free - lanes - GRAPH_BYTES
        if left <= 0:
            raise ConfigError(
                f"kv_cache_gib: no memory for the KV cache is left on {self.name}: "
                f"{free / GIB:.2f} GiB are free after the weights, activations of max_model_len "
                f"tokens take {lanes / GIB:.2f}, graphs {GRAPH_BYTES / GIB:.2f}; set a smaller "
                "max_model_len, or kv_cache_gib",
                param="kv_cache_gib",
            )
        return int(left * CACHE_SHARE)

    def start_executor(self, model: _cuda.Model, plan: _cuda.PlanOptions | None) -> _cuda.Executor:
        """Start the executor, which measures kernels first and captures the graphs of short runs.

        Without a plan (no rates are known yet) graphs are captured as runs come.
        """
        try:
            executor: _cuda.Executor = self.native.Executor(model, plan)
            executor.start()
        except RuntimeError as error:
            raise ConfigError(f"{self.name}: {error}", param="device") from None
        if model.gemm_cache_failure:
            log.warning(
                "%s: every start measures the kernels of products again: %s",
                self.name,
                model.gemm_cache_failure,
            )
        return executor

    def workspace_bytes(self, model: _cuda.Model) -> int:
        """Return what suspended runs hold outside of the lanes."""
        report = model.lane_report()
        return int(report["device_spill_bytes"]) + int(report["pinned_spill_bytes"])

    def identity(self) -> Mapping[str, Any]:
        """Return the GPU, the versions of driver and runtime, and fp8 where weights are that."""
        numbers = {"quantization": "fp8"} if self.quantization == "fp8" else {}
        return {
            "gpu": self._info["name"],
            "compute_capability": self._capability(),
            "driver": self._info["driver_version"],
            "runtime": self._info["runtime_version"],
            **numbers,
        }

    def describe(self) -> dict[str, Any]:
        """Return device, reason, numbers, and the GPU's name, memory and versions."""
        return {
            "device": self.name,
            "reason": self.reason,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "memory_gib": round(self._info["memory_bytes"] / GIB, 1),
            **self.identity(),
        }


def cublas_lt_libraries(module: Any, index: int) -> list[str]:
    """Return where cuBLASLt of the runtime's version may lie; it is loaded if it is there.

    Args:
        module: ``flowprefill._cuda``. index: of the GPU.
    """
    major = str(module.device_info(index)["runtime_version"]).partition(".")[0]
    name = f"libcublasLt.so.{major}"
    packages = Path(sysconfig.get_path("platlib")) / "nvidia"  # a torch with CUDA brings them
    return [*map(str, sorted(packages.glob(f"*/lib/{name}"))), name]
