"""The import rule of docs/architecture.md: which layer may know which other and which library.

Reads sources only (Python syntax trees, C++ #include lines), so it runs without a build.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "flowprefill"
CSRC = ROOT / "csrc"

# Everything may import these; they import only each other and the standard library.
COMMON = {"request", "config", "errors", "version"}


@dataclass(frozen=True)
class Layer:
    """What one folder (or module) of the package may import besides COMMON and the stdlib."""

    own: frozenset[str] = frozenset()
    libraries: frozenset[str] = frozenset()


def _layer(own: str = "", libraries: str = "") -> Layer:
    return Layer(frozenset(own.split()), frozenset(libraries.split()))


PYTHON_LAYERS = {
    **{name: _layer() for name in COMMON},
    "scheduling": _layer("scheduling"),
    "policies": _layer("scheduling"),
    "models": _layer("models", "torch numpy safetensors tokenizers jinja2 gguf"),
    "native": _layer("_core", "torch"),
    "engine": _layer("engine scheduling models native _cuda", "torch numpy llguidance"),
    "server": _layer("server engine models", "aiohttp prometheus_client opentelemetry"),
    "traces": _layer("traces"),
    "explain": _layer("client"),
    "client": _layer(),
    "argument_parser": _layer(),
    "terminal": _layer(),
    "simulation": _layer("simulation traces scheduling engine models native", "numpy"),
}
# They join layers, so they may import any; `__init__` is the lazy front door (test_packaging.py).
UNRESTRICTED = {"bench", "chat", "cli", "__init__", "__main__"}

# The scheduler is a function of events: it must not read a clock, wait, or do input and output.
IMPURE = {"time", "datetime", "asyncio", "threading", "socket", "select", "subprocess", "io", "os"}
IMPURE_CALLS = {"open", "print", "input"}

# A folder of csrc -> the folders it may include besides itself. The order inside devices/cuda is
# part of the rule.
CPP_LAYERS = {
    "runtime": set(),
    "graph": {"runtime"},
    "devices/cpu": {"graph", "runtime"},
    "devices/cuda/runtime": {"graph", "runtime"},
    "devices/cuda/kernels": {"devices/cuda/runtime", "graph"},
    "devices/cuda/backend": {
        "devices/cuda/kernels",
        "devices/cuda/runtime",
        "graph",
        "runtime",
    },
    "bindings": {"devices/cpu", "devices/cuda/backend", "devices/cuda/runtime", "graph", "runtime"},
}
TENSORS = ("ATen/", "c10/", "torch/")
CUDA = ("cuda", "cublas", "cutlass/", "cute/", "c10/cuda/", "ATen/cuda/", "nv")
PYTHON = ("Python.h", "pybind11/", "torch/csrc/")
FORBIDDEN_HEADERS = {
    "runtime": TENSORS + CUDA + PYTHON,
    "graph": TENSORS + CUDA + PYTHON,
    "devices/cpu": CUDA + PYTHON,
    "devices/cuda/runtime": TENSORS + PYTHON,
    "devices/cuda/kernels": TENSORS + PYTHON,
    "devices/cuda/backend": TENSORS + PYTHON,
    "bindings": CUDA,
}
# Each costs 10 to 30 seconds per file; single ATen/ops/*.h headers take a few.
SLOW_HEADERS = {
    "ATen/ATen.h",
    "ATen/Functions.h",
    "torch/all.h",
    "torch/torch.h",
    "torch/extension.h",
}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> Iterator[str]:
    """Yield every imported module, dotted; `from flowprefill import x` gives flowprefill.x."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level
            elif node.module == "flowprefill":
                yield from (f"flowprefill.{alias.name}" for alias in node.names)
            elif node.module:
                yield node.module


def python_violations(layer: str, source: str) -> list[str]:
    """Name each import that `layer` must not make."""
    allowed = PYTHON_LAYERS[layer]
    found = []
    for name in imports(source):
        head, _, rest = name.partition(".")
        if head == "":
            found.append("relative import: write flowprefill. in full")
        elif head == "flowprefill":
            if rest.partition(".")[0] not in COMMON | allowed.own:
                found.append(f"{layer} must not import {name}")
        elif head not in sys.stdlib_module_names and head not in allowed.libraries:
            found.append(f"{layer} must not import {name}")
    return found


def impurities(source: str) -> list[str]:
    """Name each import or call by which the scheduler would see the world outside its events."""
    found = [f"imports {name}" for name in imports(source) if name.partition(".")[0] in IMPURE]
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in IMPURE_CALLS
        ):
            found.append(f"line {node.lineno} calls {node.func.id}()")
    return found


def cpp_layer_of(header: str) -> str:
    """Return the layer that a path below csrc/ belongs to, or its folder if that is no layer."""
    folder = header.rpartition("/")[0]
    return next((layer for layer in CPP_LAYERS if f"{header}/".startswith(f"{layer}/")), folder)


def cpp_violations(layer: str, source: str) -> list[str]:
    """Name each #include that `layer` must not have."""
    found = []
    for bracket, header in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', source, re.MULTILINE):
        if bracket == '"' and cpp_layer_of(header) not in {layer, *CPP_LAYERS[layer]}:
            found.append(f'csrc/{layer} must not include "{header}" (paths start at csrc/)')
        elif header in SLOW_HEADERS:
            found.append(f"<{header}> is slow to compile: include single ATen/ops/*.h headers")
        elif bracket == "<" and header.startswith(FORBIDDEN_HEADERS[layer]):
            found.append(f"csrc/{layer} must not include <{header}>")
    return found


def python_files() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if layer_of(p) not in UNRESTRICTED]


def cpp_files() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cc", ".cu", ".cuh"})


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", python_files(), ids=_relative)
def test_python_layer_imports_only_what_it_may(path: Path) -> None:
    assert layer_of(path) in PYTHON_LAYERS, "a new layer: say in PYTHON_LAYERS what it may import"
    assert python_violations(layer_of(path), path.read_text()) == []


def test_nothing_but_native_imports_the_native_module() -> None:
    """So that torch comes first."""
    users = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if any(name.startswith("flowprefill._core") for name in imports(path.read_text()))
    ]
    assert users == ["native.py"]


@pytest.mark.parametrize("path", sorted((PACKAGE / "scheduling").rglob("*.py")), ids=_relative)
def test_scheduling_is_pure(path: Path) -> None:
    assert impurities(path.read_text()) == []


@pytest.mark.parametrize("path", cpp_files(), ids=_relative)
def test_cpp_layer_includes_only_what_it_may(path: Path) -> None:
    layer = cpp_layer_of(path.relative_to(CSRC).as_posix())
    assert layer in CPP_LAYERS, "a new layer: say in CPP_LAYERS what it may include"
    assert cpp_violations(layer, path.read_text()) == []


# The rule itself: were a check above to become blind, these would say so.


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("scheduling", "import torch"),
        ("scheduling", "import numpy as np"),
        ("scheduling", "from flowprefill._core import Executor"),
        ("scheduling", "from flowprefill import engine"),
        ("engine", "def f():\n    import aiohttp.web"),
        ("server", "import torch"),
        ("models", "from flowprefill.engine import Engine"),
        ("request", "from flowprefill.scheduling import Scheduler"),
        ("server", "from . import app"),
        ("engine", "from flowprefill import _core"),
    ],
)
def test_python_rule_forbidden_import_is_found(layer: str, source: str) -> None:
    assert len(python_violations(layer, source)) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("scheduling", "import heapq\nfrom flowprefill.request import SLO"),
        (
            "engine",
            "import flowprefill._cuda\nfrom flowprefill.models.tokenizer import Tokenizer",
        ),
    ],
)
def test_python_rule_allowed_import_is_let_through(layer: str, source: str) -> None:
    assert python_violations(layer, source) == []


@pytest.mark.parametrize("source", ["import time", "from time import monotonic", "x = open('f')"])
def test_purity_clock_or_file_is_found(source: str) -> None:
    assert len(impurities(source)) == 1


@pytest.mark.parametrize(
    ("layer", "header"),
    [
        ("runtime", "<ATen/core/Tensor.h>"),
        ("runtime", "<cuda_runtime.h>"),
        ("runtime", "<Python.h>"),
        ("runtime", '"graph/batch.h"'),
        ("graph", '"devices/cpu/gemm.h"'),
        ("graph", "<ATen/core/Tensor.h>"),
        ("devices/cpu", "<ATen/ATen.h>"),
        ("devices/cpu", "<pybind11/pybind11.h>"),
        ("devices/cpu", '"devices/cuda/runtime/graph.h"'),
        ("devices/cpu", '"cpu_device.h"'),
        ("devices/cuda/runtime", '"devices/cuda/kernels/kernels.h"'),
        ("devices/cuda/kernels", '"devices/cuda/backend/cuda_backend.h"'),
        ("devices/cuda/backend", '"devices/cpu/weights.h"'),
        ("devices/cuda/backend", "<ATen/core/Tensor.h>"),
    ],
)
def test_cpp_rule_forbidden_include_is_found(layer: str, header: str) -> None:
    assert len(cpp_violations(layer, f"#include {header}\n")) == 1
