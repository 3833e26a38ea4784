"""CpuDevice: the processor as the engine sees it; made by `device_choice.open_device`."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flowprefill.config import GIB, EngineConfig, Granularity
from flowprefill.engine.control_groups import memory_left, usable_cores
from flowprefill.engine.device import ProbeSizes
from flowprefill.engine.host_memory import Room, available, largest_tensor, weight_bytes
from flowprefill.errors import CheckpointError, ConfigError, no_threads
from flowprefill.native import _core

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flowprefill.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)

DEFAULT_CACHE_GIB = 1.0  # of the KV cache, where the settings name none
# Where the settings leave it open, matrices that take more than this in dtype stay in GGUF's
# blocks: small ones multiply faster once they are expanded, large ones take too much memory.
MOST_EXPANDED_GIB = 1.0


@contextmanager
def _threads_named(count: int) -> Iterator[None]:
    """Turn the native error of a thread that the system does not start into that of the setting."""
    try:
        yield
    except RuntimeError as error:
        if os.strerror(errno.EAGAIN) not in str(error):
            raise
        raise no_threads(f"{count} of them", error) from None


class CpuDevice:
    """The processor: compute threads of this process; see Device."""

    native: Any = _core
    name = "cpu"
    max_model_len = 0
    max_running = 64
    is_exclusive = False
    probe_sizes = ProbeSizes(tokens=256, context=3072)
    granularity = Granularity("budget", budget_s=2e-3)

    def __init__(self, config: EngineConfig, reason: str) -> None:
        """Settle element type and threads.

        Raises:
            ConfigError: bf16 or int8 on a processor that does not multiply it; fp8;
                FLOWPREFILL_ISA names no instruction set, or one that it does not have.
        """
        self.reason = reason
        if config.quantization == "fp8":
            raise ConfigError(
                "quantization: got 'fp8', expected 'auto', 'none', 'int8' or 'gguf' on the CPU "
                f"({reason}): FP8 is multiplied by GPUs of compute capability 8.9 or more",
                param="quantization",
            )
        self.dtype = resolve_dtype(config.dtype)
        if config.quantization == "int8" and not _core.has_int8_gemm():
            raise ConfigError(
                "quantization: got 'int8', but this processor does not multiply bytes natively "
                "(AVX-512 VNNI or AMX), expected 'none'",
                param="quantization",
            )
        self.quantization = self._chosen = config.quantization
        self.threads = resolve_threads(config.threads)
        self._background = config.background
        self._numbers = "int8" if config.quantization == "int8" else "none"
        self._room: Room  # what was available when its model was made

    def make_model(self, checkpoint: Checkpoint) -> _core.Model:
        """Make an empty model; any number of tokens fits."""
        formats = self.block_formats(checkpoint)
        if self.quantization == "auto":
            self._chosen = "gguf" if formats else "none"
        graph, numbers = checkpoint.graph, self._numbers
        needed = weight_bytes(graph, self.dtype, numbers, formats)
        self._room, free = available()
        if needed > self._room.bytes:
            raise self.no_memory(checkpoint)
        if needed > free.bytes:
            log.warning("the kernel may end this process: %s", self._too_large(checkpoint, free))
        with _threads_named(self.threads):
            try:
                return _core.Model(graph, self.dtype, self.threads, numbers, formats=formats)
            except MemoryError:
                raise self.no_memory(checkpoint) from None
            except ValueError as error:
                raise CheckpointError(str(error)) from None

    def no_memory(self, checkpoint: Checkpoint) -> ConfigError:
        """Return the error for weights that are too large, with the settings that take less."""
        message = self._too_large(checkpoint, self._room)
        return ConfigError(f"memory: {message}", param="quantization")

    def _too_large(self, checkpoint: Checkpoint, room: Room) -> str:
        graph, dtype, numbers = checkpoint.graph, self.dtype, self._numbers
        needed = weight_bytes(graph, dtype, numbers, self.block_formats(checkpoint))
        in_blocks = checkpoint.block_formats(_core.block_formats)
        sizes = {"quantization 'gguf'": weight_bytes(graph, dtype, "none", in_blocks)}
        if _core.has_bf16_gemm():
            sizes["dtype 'bf16'"] = weight_bytes(graph, "bf16", numbers, {})
        if _core.has_int8_gemm():
            sizes["quantization 'int8'"] = weight_bytes(graph, dtype, "int8", {})
        less = [f"{size / GIB:.2f} with {how}" for how, size in sizes.items() if size < needed]
        advice = f"settings that take less ({', '.join(less)})" if less else "a smaller model"
        return (
            f"the weights take {needed / GIB:.2f} GiB, and reading them a few times the "
            f"{largest_tensor(graph) / GIB:.2f} of their largest; {room.bytes / GIB:.2f} GiB are "
            f"available ({room.bound}), expected {advice}"
        )

    def block_formats(self, checkpoint: Checkpoint) -> Mapping[str, str]:
        """Return the quantised tensors that have kernels here, if they are to stay so.

        Raises:
            ConfigError: the settings want it, and the model has none.
        """
        if self.quantization not in ("auto", "gguf"):
            return {}
        formats = checkpoint.block_formats(_core.block_formats)
        if self.quantization == "gguf":
            if not formats:
                raise ConfigError(
                    f"quantization: got 'gguf', but {checkpoint.name} has no weights in quantised "
                    f"types of GGUF that stay so ({', '.join(_core.block_formats)}), expected "
                    "'auto', 'none' or 'int8'",
                    param="quantization",
                )
            return formats
        element_bytes = 2 if self.dtype == "bf16" else 4
        elements = sum(count for _, count in checkpoint.graph.products())
        return formats if elements * element_bytes > MOST_EXPANDED_GIB * GIB else {}

    def cache_bytes(self, model: _core.Model) -> int:
        """Return a fixed size, or half of what a control group leaves if that is less.

        What else wants the machine's memory cannot be known. The other half is for activations,
        Python, and the processes that render chats. Called when the weights are loaded.
        """
        del model
        left, wanted = memory_left(), int(DEFAULT_CACHE_GIB * GIB)
        if left is None or left // 2 >= wanted:
            return wanted
        log.info(
            "the KV cache gets %.2f GiB: half of what the limit of the control group leaves",
            left / 2 / GIB,
        )
        return left // 2

    def start_executor(self, model: _core.Model, plan: _core.PlanOptions | None) -> _core.Executor:
        """Start an executor; it runs any model's runs, and has nothing to prepare."""
        del model, plan
        with _threads_named(self.threads):
            executor = _core.Executor(self.threads, self._background)
            executor.start()
        return executor

    def workspace_bytes(self, model: _core.Model) -> int:
        """Return the workspaces of this process."""
        del model
        return _core.live_workspace_bytes()

    def identity(self) -> Mapping[str, Any]:
        """Return quantization, threads, instruction set and cores."""
        return {
            "quantization": self.quantization,
            "threads": self.threads,
            "isa": _core.isa(),
            "cores": len(os.sched_getaffinity(0)),
        }

    def describe(self) -> dict[str, Any]:
        """Return device, reason, numbers, threads and instruction set."""
        return {
            "device": self.name,
            "reason": self.reason,
            "dtype": self.dtype,
            "quantization": self._chosen,
            "threads": self.threads,
            "isa": _core.isa(),
        }


def resolve_dtype(dtype: str) -> str:
    """Return ``bf16`` or ``f32``; ``auto`` is bf16 where the processor multiplies it natively."""
    try:
        has_bf16 = _core.has_bf16_gemm()
    except ValueError as error:
        raise ConfigError(str(error), param="FLOWPREFILL_ISA") from None
    if dtype == "auto":
        return "bf16" if has_bf16 else "f32"
    if dtype == "bf16" and not has_bf16:
        raise ConfigError(
            f"dtype: got 'bf16', but {_core.isa()} does not multiply bf16, expected 'f32'",
            param="dtype",
        )
    return dtype


def resolve_threads(threads: int) -> int:
    """Return the compute threads: those asked for, or one per core this process may use."""
    return threads or usable_cores()
