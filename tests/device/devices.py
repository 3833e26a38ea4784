"""The devices of this suite: what each is called, computes with, and how exact that is.

cpu and its variants are always there; cuda-double where FLOWPREFILL_CUDA_DOUBLE names the module
_cuda over doubles of CUDA's runtime and kernels (make test-cuda-engine builds it); cuda where _cuda
is built, and its tests are skipped without a GPU. What devices differ in stands here, not in tests.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny_models import SERVED

from flowprefill import Engine, EngineConfig, _core
from flowprefill.engine.cuda_device import CudaDevice
from flowprefill.engine.device import ProbeSizes

DOUBLE = os.environ.get("FLOWPREFILL_CUDA_DOUBLE", "")
NAME = "flowprefill._cuda"
# Around the borders of row blocks (16), chunks (32), tiles (64) and tiles of two threads (128).
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200)
GRANULARITIES = ("none", "layer", "operator", "chunk:16", "chunk:32", "budget:2", "budget:0.1")
# Sizes that are no multiple of the CPU kernels' blocks (16 rows, 32 and 64 columns).
SMALL = {
    "vocab_size": 200, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "max_position_embeddings": 1024, "pad_token_id": None, "rope_theta": 10000.0,
}  # fmt: skip
ON_CPU = {"dtype": "f32", "threads": 1, "kv_cache_gib": 0.02}
BF16 = 0.06  # of 8 bits, after a few layers of rounding
INT8 = 0.12  # of 8 bits for a whole row of weights and of activations; found: up to 0.09
FOR_CUDA: dict[str, Any] = {  # whose kernels take multiples of 8, and of head sizes a few
    "dtype": "bf16",
    "tolerance": BF16,
    "shape": SMALL
    | {"vocab_size": 515, "hidden_size": 128, "intermediate_size": 208, "num_hidden_layers": 2}
    | {"head_dim": 64},
    "served": SERVED
    | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64}
    | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "settings": {"device": "cuda", "threads": 1, "kv_cache_gib": 0.02, "max_model_len": 2048}
    | {"granularity": "operator"},
    "long_prompt": 1500,
    "preemptible": ("operator", "chunk:64", "budget:0.5"),
}
# As many as the double computes in seconds.
FEW = {"lengths": (1, 65, 130), "granularities": ("none", "operator", "chunk:64", "budget:0.1")}


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        dtype, threads, quantization: of models on the CPU.
        tolerance: largest difference to transformers in float32, over the largest logit.
        lengths, granularities: prompts to compute and how to cut them, fewer where it is slow.
        long_prompt: tokens that an engine prefills for so long that others come meanwhile.
        preemptible: how engines cut it so that it is not past its last boundary by then.
        is_met: whether others surely come meanwhile; a GPU may be quicker.
    """

    name: str
    dtype: str = "f32"
    threads: int = 1
    quantization: str = "none"
    tolerance: float = 1e-4
    shape: Mapping[str, Any] = field(default_factory=lambda: SMALL)
    served: Mapping[str, Any] = field(default_factory=lambda: SERVED)
    settings: Mapping[str, Any] = field(default_factory=lambda: ON_CPU)
    lengths: tuple[int, ...] = LENGTHS
    granularities: tuple[str, ...] = GRANULARITIES
    long_prompt: int = 12_000
    preemptible: tuple[str, ...] = ("layer", "operator", "chunk:64", "budget:0.5")
    is_met: bool = True

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")

    @property
    def is_double(self) -> bool:
        return self.name == "cuda-double"

    @property
    def module(self) -> Any:
        """The native module."""
        if self.is_double:
            return double_module()
        return importlib.import_module(NAME) if self.is_cuda else _core

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have engines of this test find it.

        Calibration computes less on the double: its plain loops would take minutes.
        """
        if self.dtype == "bf16" and not self.is_cuda and not _core.has_bf16_gemm():
            pytest.skip("this processor does not multiply bf16 natively")
        if self.quantization == "int8" and not _core.has_int8_gemm():
            pytest.skip("this processor does not multiply bytes natively")
        if self.is_double:
            monkeypatch.setitem(sys.modules, NAME, self.module)
            monkeypatch.setattr(CudaDevice, "probe_sizes", ProbeSizes(128, 512, fills_context=True))

    def open_engine(self, folder: Path, **settings: Any) -> Engine:
        """An uncalibrated engine on this device unless told otherwise."""
        return Engine(folder, EngineConfig(**({"calibrate": False} | self.settings | settings)))


DEVICES = {
    name: Device(name, **of)
    for name, of in {
        "cpu": {},
        "cpu-team": {"threads": 2},
        "cpu-bf16": {"dtype": "bf16", "tolerance": BF16},
        "cpu-bf16-team": {"dtype": "bf16", "tolerance": BF16, "threads": 2},
        "cpu-int8": {"quantization": "int8", "tolerance": INT8, "threads": 2} | FEW,
        "cuda-double": FOR_CUDA
        | {
            "lengths": (1, 65, 130),
            "granularities": ("none", "operator", "chunk:64", "budget:0.1"),
        },
        "cuda": FOR_CUDA | {"is_met": False},
    }.items()
}
ONE = ("cpu", "cuda-double", "cuda")  # a kind of device each
GPUS = ("cuda-double", "cuda")
EVERY = tuple(DEVICES)


@cache
def double_module() -> Any:
    """Load the double, without leaving it to be found: tests that do not ask have no GPU."""
    before = sys.modules.pop(NAME, None)
    spec = importlib.util.spec_from_file_location(NAME, DOUBLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop(NAME, None)
    if before is not None:
        sys.modules[NAME] = before
    return module


def is_built(name: str) -> bool:
    """Whether a device's module is there."""
    if name == "cuda":
        return importlib.util.find_spec(NAME) is not None
    return name != "cuda-double" or bool(DOUBLE)


def on(names: Iterable[str], cases: Iterable[str] = ()) -> pytest.MarkDecorator:
    """Run a test with the fixture `device` on these devices, and with each `case` that it takes."""
    from cases import takes

    devices = [DEVICES[name] for name in names if is_built(name)]
    pairs = [(device, case) for case in cases for device in devices if takes(device, case)]
    found = pairs if cases else [(device, "") for device in devices]
    params = [
        pytest.param(
            *((device, case) if cases else (device,)),
            marks=[pytest.mark.gpu] if device.name == "cuda" else [],
            id=f"{device.name}-{case}" if cases else device.name,
        )
        for device, case in found
    ]
    names = ("device", "case") if cases else ("device",)
    return pytest.mark.parametrize(names, params, indirect=["device"])
