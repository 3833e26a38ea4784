"""Fixtures of the GPU tests: tiny checkpoints, runners of native runs on the GPU.

FLOWPREFILL_CUDA_DOUBLE names a module _cuda built on the double of the CUDA runtime
(tests/cuda_engine); then these tests run on that, but for those of times: so the suite itself is
tested where there is no GPU. Run this folder alone then.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from gpu_models import CASES, Runner, save_checkpoint

DOUBLE = os.environ.get("FLOWPREFILL_CUDA_DOUBLE", "")


def _load_double() -> None:
    name = "flowprefill._cuda"
    spec = importlib.util.spec_from_file_location(name, DOUBLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module


if DOUBLE:
    _load_double()


@pytest.fixture(scope="session")
def is_double() -> bool:
    """Whether there is no GPU, but the double: take small sizes."""
    return bool(DOUBLE)


@pytest.fixture
def real_times(is_double: bool) -> None:
    """Skip on the double, whose clock stands still but for kernels."""
    if is_double:
        pytest.skip("the double of the CUDA runtime has no times")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a case of CASES once; returns its folder."""

    @cache
    def save(case: str) -> Path:
        folder = tmp_path_factory.mktemp("gpu") / case
        save_checkpoint(case, folder)
        return folder

    assert CASES
    return save


@pytest.fixture
def open_runner(checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Runner]]:
    """Load a case onto the GPU with these options of the native model; closed at the end."""
    opened: list[Runner] = []

    def open_one(case: str = "llama", **options: object) -> Runner:
        opened.append(Runner(checkpoint(case), options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()
