"""`flowprefill doctor`: processor, its ceilings, memory, GPUs, torch, default model.

Ceilings are the peak of each element type and the bandwidth of caches and DRAM, by one thread and
by all, measured by our own kernels; `flowprefill bench where` holds operators against them.
Of GPUs it says which device the setting ``auto`` chooses and why, what the module for them was
compiled for, and of each GPU whether it can be used.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowprefill.config import GIB
from flowprefill.engine.control_groups import memory_left, usable_cores
from flowprefill.engine.device_choice import choose_device, cuda_module
from flowprefill.errors import CheckpointError
from flowprefill.version import __version__

# Instruction sets that decide which kernels run, as /proc/cpuinfo spells them (x86, then Arm).
ISA_FLAGS = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_tile",
    "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
GEMM_SIZE = 1024
GEMM_ROUNDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print what was found."""
    found = examine()
    if args.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut is of no use
    for name, value in found.items():
        table.add_row(name.replace("_", " "), _shown(value))
    Console().print(table)
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return "\n".join(f"{name.replace('_', ' ')}: {_inline(of)}" for name, of in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "no limit, or not known"}[value]
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {of}" for name, of in value.items())
    return _shown(value)


def examine() -> dict[str, Any]:
    """Return every finding by name; takes one or two seconds."""
    import torch

    return {
        **system_findings(),
        "gemm_f32_gflops": gemm_gflops(torch.float32),
        "gemm_bf16_gflops": gemm_gflops(torch.bfloat16),
        **ceilings(),
        "default_model": default_model(),
    }


def system_findings() -> dict[str, Any]:
    """Return the findings that nothing has to be measured for."""
    import torch

    cpuinfo = _read("/proc/cpuinfo")
    return {
        "flowprefill": __version__,
        "native_module": importlib.util.find_spec("flowprefill._core") is not None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _first(r"model name\s*:\s*(.+)", cpuinfo) or platform.processor() or "unknown",
        "instruction_sets": isa_flags(cpuinfo),
        "cores_available": len(os.sched_getaffinity(0)),
        "cores_usable": usable_cores(),
        "cores_online": os.cpu_count() or 0,
        "memory_gib": _memory_gib("MemTotal"),
        "memory_available_gib": _memory_gib("MemAvailable"),
        "memory_left_to_group_gib": _group_memory_gib(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "openmp": openmp_libraries(_read("/proc/self/maps")),
        "torch_cuda": torch_cuda(),
        **gpu_findings(),
    }


def _read(path: str) -> str:
    """Return a file of /proc, "" where there is none (not Linux)."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1].strip() if match else None


def isa_flags(cpuinfo: str) -> list[str]:
    """Return which of ISA_FLAGS the processor has, given the text of /proc/cpuinfo."""
    line = _first(r"(?:flags|Features)\s*:\s*(.+)", cpuinfo) or ""
    flags = set(line.split())
    return [flag for flag in ISA_FLAGS if flag in flags]


def _memory_gib(field: str) -> float | None:
    kib = _first(rf"{field}:\s*(\d+) kB", _read("/proc/meminfo"))
    return round(int(kib) / 2**20, 1) if kib else None


def _group_memory_gib() -> float | None:
    left = memory_left()
    return None if left is None else round(left / GIB, 1)


def openmp_libraries(maps: str) -> list[str]:
    """Return the OpenMP runtimes mapped into this process; more than one is trouble."""
    found: Iterable[str] = re.findall(r"(\S*lib(?:gomp|iomp5|omp)[-.\w]*\.so\S*)", maps)
    return sorted({Path(path).name for path in found})


def torch_cuda() -> str:
    """Return whether torch was built with CUDA, and what it sees; the engine needs neither."""
    import torch

    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"CUDA {torch.version.cuda}, no device"
    return f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name(0)}"


def gpu_findings() -> dict[str, Any]:
    """Return the device that ``auto`` chooses and why, and what is known of each GPU."""
    choice = choose_device("auto")
    module, reason = cuda_module()
    found: dict[str, Any] = {"device": f"{choice.name}: {choice.reason}"}
    if module is None:
        return found | {"cuda_module": reason, "gpus": []}
    gpus = [module.availability(index) for index in range(module.device_count())]
    return found | {
        "cuda_module": f"compiled for {module.architectures}",
        "gpus": [
            f"cuda:{index} {about}{'' if is_usable else ' (not usable)'}"
            for index, (is_usable, about) in enumerate(gpus)
        ],
    }


def ceilings() -> dict[str, Any]:
    """Return the instruction set in use, and what this machine can do at most with it.

    Rates are GFLOP/s (GOP/s for int8, 0 without an instruction for it) and GB/s of reading memory
    of each size over and over; other work on the machine lowers them.
    """
    from flowprefill.native import _core

    try:
        found: dict[str, Any] = {"isa": _core.isa(), "isas_available": _core.available_isas()}
    except ValueError as error:
        return {"isa": str(error)}
    cores = len(os.sched_getaffinity(0))
    for name, threads in {"peak_one_thread": 1, f"peak_{cores}_threads": cores}.items():
        rates = _core.measure_ceilings(threads)
        found[name] = {
            "f32_gflops": round(rates["f32"] / 1e9, 1),
            "bf16_gflops": round(rates["bf16"] / 1e9, 1),
            "int8_gops": round(rates["int8"] / 1e9, 1),
            "read_gb_per_s": {
                f"{size / 2**20:g} MiB": round(rate / 1e9, 1) for size, rate in rates["reads"]
            },
        }
    return found


def gemm_gflops(dtype: Any) -> float:
    """Return the best rate of a square matrix product through torch, GFLOP/s."""
    import torch

    a = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype)
    b = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype)
    best_s = float("inf")
    for _ in range(GEMM_ROUNDS):
        start_s = time.perf_counter()
        torch.mm(a, b)
        best_s = min(best_s, time.perf_counter() - start_s)
    return round(2 * GEMM_SIZE**3 / best_s / 1e9, 1)


def default_model() -> str:
    """Return where the default model lies, or how to get it."""
    from flowprefill.models.registry import DEFAULT_MODEL, resolve_model

    try:
        return str(resolve_model(DEFAULT_MODEL).path)
    except CheckpointError as error:
        return error.message
