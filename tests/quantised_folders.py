"""Writes tiny quantised checkpoints of every kind that is read, by numpy alone, and what they mean.

Used by the tests of folders and of devices.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

Matrix = npt.NDArray[np.float32]
Tensors = dict[str, torch.Tensor]
LARGEST = 448.0  # in e4m3
PROJECTIONS = ("_proj", ".w1", ".w2", ".w3")  # the latter of a Mixtral's experts


@dataclass(frozen=True)
class Kind:
    """One way to quantise: so many rows and columns share a scale; 0: all of them."""

    method: str = "compressed-tensors"
    format: str = "float-quantized"
    bits: int = 8
    rows: int = 0
    columns: int = 0
    strategy: str = "tensor"
    is_symmetric: bool = True
    is_reordered: bool = False  # columns belong to groups in no order
    scale_dtype: torch.dtype = torch.bfloat16
    scale_name: str = "weight_scale"
    scale_shape: tuple[int, ...] | None = None
    other: str = "input_scale"

    @property
    def is_float(self) -> bool:
        return self.format == "float-quantized"

    @property
    def is_packed(self) -> bool:
        return self.format == "pack-quantized"

    def config(self) -> dict[str, Any]:
        """Return what config.json says of it."""
        if self.method == "fp8":
            block = [self.rows, self.columns] if self.rows else None
            ignored = {"modules_to_not_convert": ["lm_head"], "activation_scheme": "dynamic"}
            return {"quant_method": "fp8", "weight_block_size": block, "fmt": "e4m3", **ignored}
        weights: dict[str, Any] = {
            "num_bits": self.bits, "type": "float" if self.is_float else "int",
            "strategy": self.strategy, "symmetric": self.is_symmetric, "dynamic": False,
            "group_size": self.columns if self.strategy == "group" else None,
            "block_structure": [self.rows, self.columns] if self.strategy == "block" else None,
        }  # fmt: skip
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {
            "quant_method": self.method, "format": self.format, "ignore": ["lm_head"],
            "config_groups": {"group_0": group}, "quantization_status": "compressed",
            "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {},
        }  # fmt: skip


KINDS = {
    "fp8 block": Kind("fp8", rows=16, columns=32, scale_dtype=torch.float32,
                      scale_name="weight_scale_inv"),
    "fp8 block bf16": Kind("fp8", rows=128, columns=128, scale_name="weight_scale_inv"),
    "fp8 block powers of 2": Kind("fp8", rows=16, columns=16, scale_dtype=torch.float8_e8m0fnu,
                                  scale_name="weight_scale_inv"),
    "fp8 tensor": Kind("fp8", scale_dtype=torch.float32, scale_shape=(),
                       scale_name="weight_scale_inv", other="activation_scale"),
    "fp8 tensor, older": Kind("fp8", scale_dtype=torch.float32, scale_shape=(1,)),
    "float tensor": Kind(scale_shape=(1,)),
    "float channel": Kind(strategy="channel", rows=1, scale_dtype=torch.float32),
    "float block": Kind(strategy="block", rows=32, columns=16),
    "int8 channel": Kind(format="int-quantized", strategy="channel", rows=1),
    "int8 channel, zero points": Kind(format="int-quantized", strategy="channel", rows=1,
                                      is_symmetric=False),
    "int8 tensor": Kind(format="int-quantized", scale_shape=(1,)),
    "int4 group": Kind(format="pack-quantized", bits=4, strategy="group", rows=1, columns=8),
    "int4 group, zero points": Kind(format="pack-quantized", bits=4, strategy="group", rows=1,
                                    columns=8, is_symmetric=False, scale_dtype=torch.float16),
    "int4 group, reordered": Kind(format="pack-quantized", bits=4, strategy="group", rows=1,
                                  columns=8, is_reordered=True),
    "int4 channel": Kind(format="pack-quantized", bits=4, strategy="channel", rows=1),
    "int4 channel, zero points": Kind(format="pack-quantized", bits=4, strategy="channel", rows=1,
                                      is_symmetric=False),
    "int8 packed": Kind(format="pack-quantized", strategy="group", rows=1, columns=8),
}  # fmt: skip


def e4m3(raw: npt.NDArray[np.uint8]) -> Matrix:
    """Return the values of bytes: a sign, 4 bits of exponent, 3 of fraction; no infinities."""
    exponent, fraction = (raw >> 3 & 15).astype(np.float64), (raw & 7) / 8
    size = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    return np.where(raw >> 7, -size, size).astype(np.float32)


def packed(values: npt.NDArray[np.int64], bits: int) -> torch.Tensor:
    """Pack values of each row into words of 32 bits, the first into the lowest bits."""
    each = 32 // bits
    unsigned = values + 2 ** (bits - 1)
    words = np.zeros((len(values), -(-values.shape[1] // each)), np.uint64)
    for column in range(values.shape[1]):
        moved = unsigned[:, column].astype(np.uint64) << np.uint64(column % each * bits)
        words[:, column // each] |= moved
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def quantised(weight: Matrix, kind: Kind, rng: np.random.Generator) -> tuple[Tensors, Matrix]:
    """Return what is stored of a matrix, by the ends of names, and the matrix it stands for."""
    rows, columns = weight.shape
    row_of = np.arange(rows) // (kind.rows or rows)
    column_of = np.arange(columns) // (kind.columns or columns)
    if kind.is_reordered:
        rng.shuffle(column_of)
    grid = (row_of[-1] + 1, column_of.max() + 1)
    largest = np.zeros(grid, np.float32)
    np.maximum.at(largest, (row_of[:, None], column_of[None, :]), np.abs(weight))
    most = LARGEST if kind.is_float else 2.0 ** (kind.bits - 1) - 1
    scale = torch.from_numpy(largest / most).to(kind.scale_dtype)
    spread = scale.float().numpy()[row_of][:, column_of]
    tensors = {kind.scale_name: scale if kind.scale_shape is None else
               scale.reshape(kind.scale_shape)}  # fmt: skip
    if kind.is_float:
        stored = torch.from_numpy(np.clip(weight / spread, -LARGEST, LARGEST))
        stored = stored.to(torch.float8_e4m3fn)
        values = e4m3(stored.view(torch.uint8).numpy())
        return tensors | {"weight": stored}, values * spread
    zero = np.zeros(grid, np.int64) if kind.is_symmetric else rng.integers(-3, 4, grid)
    whole = np.rint(weight / spread).astype(np.int64) + zero[row_of][:, column_of]
    whole = np.clip(whole, -(2 ** (kind.bits - 1)), 2 ** (kind.bits - 1) - 1)
    if not kind.is_symmetric:
        as_bytes = torch.from_numpy(zero.astype(np.int8))
        turned = packed(zero.T, kind.bits).T.contiguous()
        tensors["weight_zero_point"] = turned if kind.is_packed else as_bytes
    if kind.is_reordered:
        tensors["weight_g_idx"] = torch.from_numpy(column_of.astype(np.int32))
    if kind.is_packed:
        tensors["weight_packed"] = packed(whole, kind.bits)
        tensors["weight_shape"] = torch.tensor([rows, columns])
    else:
        tensors["weight"] = torch.from_numpy(whole.astype(np.int8))
    return tensors, (whole - zero[row_of][:, column_of]).astype(np.float32) * spread


def quantise_folder(plain: Path, folder: Path, kind: Kind) -> dict[str, Matrix]:
    """Write a folder with the projections of a plain one quantised, and all else as it is.

    Returns:
        Every projection dequantised, by its name.
    """
    rng = np.random.default_rng(2)
    tensors: Tensors = {}
    meant: dict[str, Matrix] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith(PROJECTIONS):
            tensors[name] = tensor.clone()
            continue
        parts, meant[name] = quantised(tensor.float().numpy(), kind, rng)
        parts[kind.other] = torch.tensor(0.5)
        tensors |= {f"{module}.{end}": part for end, part in parts.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = kind.config()
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def change_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change the stored tensors of a folder."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
