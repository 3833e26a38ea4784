"""GgufMetadata: parses a GGUF file's header (key-values, tensor list) with every bound checked.

Used by gguf_file and gguf_tokenizer. Own parser because gguf.GGUFReader takes over two seconds for
a vocabulary of 49,000 (this one a tenth of that) and does not notice truncation.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from flowprefill.errors import CheckpointError
from flowprefill.models.model_config import MAX_EXPERTS

_VERSIONS = (2, 3)
_MAX_DIMS = 4
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
            10: "<Q", 11: "<q", 12: "<d"}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
        shape: in torch's order (GGUF lists the fastest dimension first).
        kind: its quantisation.
        offset: from the start of the file, bytes.
        size_bytes: in the file.
        part: which file of a model that is split into several, 0 the first.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    size_bytes: int
    part: int = 0


class GgufMetadata:
    """Header of one file, which stays memory-mapped while this lives.

    Attributes:
        values: key -> int, float, bool, str or list of these.
        tensors: name -> where it lies; in the file's order. With further parts theirs too. Experts'
            matrices, which lie in one tensor, are ``NAME[0]``, ``NAME[1]``, ….
    """

    def __init__(self, path: Path) -> None:
        """Map the file and parse its header.

        Raises:
            CheckpointError: not GGUF, another version, damaged or truncated; names the file.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                # Copied where written to, which no caller does: torch wants no read-only memory.
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped ({error})", param="model") from None
        self._at = 0
        self.values: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, ValueError, OverflowError) as error:
            raise self._damaged(f"{error} at byte {self._at}") from None
        self._parts = [self._bytes]

    def add_part(self, part: GgufMetadata) -> None:
        """Take in the tensors of the next file of a split model; its keys are not looked at."""
        for name, tensor in part.tensors.items():
            if name in self.tensors:
                raise part._damaged(f"tensor {name} is in another part, too")
            self.tensors[name] = replace(tensor, part=len(self._parts))
        self._parts.append(part._bytes)

    def raw(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """Map one tensor's bytes: [rows, bytes per row]; not to be written to."""
        mapped = self._parts[tensor.part]
        flat = np.frombuffer(mapped, np.uint8, tensor.size_bytes, tensor.offset)
        return flat.reshape(*tensor.shape[:-1], -1)

    def release(self, tensor: GgufTensor) -> None:
        """Drop the pages of one tensor from this process's memory; the file's cache keeps them."""
        begin = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.offset + tensor.size_bytes - begin
        if size > 0:
            self._parts[tensor.part].madvise(mmap.MADV_DONTNEED, begin, size)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Read a key of a certain type.

        Args:
            key: full name, e.g. ``llama.block_count``.
            kind: Python type or types it must have.
            default: result for an absent key; None makes the key required.

        Raises:
            CheckpointError: absent and required, or of another type; names the key.
        """
        value = self.values.get(key, default)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(one.__name__ for one in kinds)
            shown = repr(value)[:80]
            raise CheckpointError(f"{self.path}: {key}: got {shown}, expected {names}", param=key)
        return value

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged or truncated GGUF: {reason}", param="model")

    def _parse(self) -> None:
        if self._bytes[:4] != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file (wrong magic)", param="model")
        self._at = 4
        version = self._scalar("<I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{self.path}: GGUF version: got {version}, expected 2 or 3",
                param="model",
            )
        tensor_count, value_count = self._scalar("<Q"), self._scalar("<Q")
        for _ in range(value_count):
            key = self._string()
            self.values[key] = self._value(self._scalar("<I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = self.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r}, expected a power of two")
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in infos:
            self._add_tensor(name, shape, kind, start + offset)

    def _add_tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> None:
        try:
            quantisation = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise CheckpointError(
                f"tensor {name}: got quantisation type {kind}, expected one that gguf knows",
                param=name,
            ) from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
        if not shape or shape[-1] % block:
            raise self._damaged(f"tensor {name} has shape {list(shape)}, rows in blocks of {block}")
        size = math.prod(shape) // block * block_bytes
        if offset + size > len(self._bytes):
            raise self._damaged(
                f"tensor {name} ends at byte {offset + size}, the file at {len(self._bytes)}"
            )
        for tensor in _matrices(GgufTensor(name, shape, quantisation, offset, size)):
            if tensor.name in self.tensors:
                raise self._damaged(f"tensor {tensor.name} is listed twice")
            self.tensors[tensor.name] = tensor

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self._string(), self._scalar("<I")
        if dims > _MAX_DIMS:
            raise self._damaged(f"tensor {name} has {dims} dimensions, at most {_MAX_DIMS} exist")
        shape = tuple(self._scalar("<Q") for _ in range(dims))[::-1]
        return name, shape, self._scalar("<I"), self._scalar("<Q")

    def _scalar(self, layout: str) -> Any:
        value = struct.unpack_from(layout, self._bytes, self._at)[0]
        self._at += struct.calcsize(layout)
        return value

    def _string(self) -> str:
        size = self._scalar("<Q")
        if size > len(self._bytes) - self._at:
            raise self._damaged(f"text of {size} bytes at byte {self._at} is longer than the file")
        text = self._bytes[self._at : self._at + size].decode()
        self._at += size
        return text

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._scalar("<I"), self._scalar("<Q"))
        raise self._damaged(f"value type {kind} at byte {self._at} does not exist")

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self._damaged(f"array of type {kind} at byte {self._at} is not supported")
        layout = np.dtype(np.bool_) if _SCALARS[kind] == "<?" else np.dtype(_SCALARS[kind])
        if count * layout.itemsize > len(self._bytes) - self._at:
            raise self._damaged(f"array of {count} at byte {self._at} is longer than the file")
        values: list[Any] = np.frombuffer(self._bytes, layout, count, self._at).tolist()
        self._at += count * layout.itemsize
        return values


def _matrices(tensor: GgufTensor) -> Iterator[GgufTensor]:
    """Yield the matrix of each expert, with its number in brackets; other tensors as they are."""
    is_stacked = tensor.name.endswith("_exps.weight") and len(tensor.shape) == 3
    if not is_stacked or not 1 <= tensor.shape[0] <= MAX_EXPERTS:
        yield tensor
        return
    count, *shape = tensor.shape
    size = tensor.size_bytes // count
    for expert in range(count):
        name, offset = f"{tensor.name}[{expert}]", tensor.offset + expert * size
        yield replace(tensor, name=name, shape=tuple(shape), offset=offset, size_bytes=size)


def has_values(values: Mapping[str, Any], *keys: str) -> str | None:
    """First of some keys that is present and not zero or empty, or None."""
    return next((key for key in keys if values.get(key)), None)
