"""Fixtures: the module _cuda over doubles of runtime and kernels, engines on it, a checkpoint.

`make test-cuda-engine` builds that module and names it in FLOWPREFILL_CUDA_DOUBLE; without that
these tests are skipped.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from double_engine import save_checkpoint

from flowprefill import Engine, EngineConfig
from flowprefill.engine.calibration import ProbeSizes
from flowprefill.engine.cuda_device import CudaDevice

DOUBLE = os.environ.get("FLOWPREFILL_CUDA_DOUBLE", "")


@pytest.fixture(scope="session")
def double() -> ModuleType:
    """The module, not yet to be found by others: where nobody asks for it, there is no GPU."""
    if not DOUBLE:
        pytest.skip("FLOWPREFILL_CUDA_DOUBLE is not set: make test-cuda-engine builds the module")
    name = "flowprefill._cuda"
    before = sys.modules.pop(name, None)
    spec = importlib.util.spec_from_file_location(name, DOUBLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop(name, None)
    if before is not None:
        sys.modules[name] = before
    return module


@pytest.fixture
def cuda(double: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The same as `import flowprefill._cuda` finds it during this test.

    Calibration computes less than on a GPU: the doubles' plain loops would take minutes.
    """
    monkeypatch.setitem(sys.modules, "flowprefill._cuda", double)
    monkeypatch.setattr(CudaDevice, "probe_sizes", ProbeSizes(128, 512, fills_context=True))
    return double


@pytest.fixture(scope="session")
def controls(double: ModuleType) -> ctypes.CDLL:
    """What tests ask of the double of the runtime: see double_controls.cc."""
    library = ctypes.CDLL(DOUBLE)
    library.double_fail_call_of.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
    library.double_num_faults.restype = ctypes.c_size_t
    return library


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama of the shapes that the kernels take."""
    folder = tmp_path_factory.mktemp("double") / "tiny-llama"
    save_checkpoint(folder)
    return folder


@pytest.fixture
def open_engine(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Make an engine with these settings; closed at the end."""
    engines: list[Engine] = []
    defaults: dict[str, Any] = {
        "calibrate": False, "kv_cache_gib": 0.01, "max_model_len": 2048, "threads": 1,
        "granularity": "operator", "cache_dir": str(tmp_path), "prefix_cache": False,
    }  # fmt: skip

    def open_one(**settings: Any) -> Engine:
        engines.append(Engine(checkpoint, EngineConfig(**(defaults | settings))))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close(0.0)
