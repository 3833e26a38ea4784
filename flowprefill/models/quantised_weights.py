"""Finds quantised weights among the tensors of safetensors files, and dequantises; see hf_folder.

What belongs to a matrix is stored next to it: ``NAME.weight`` or ``NAME.weight_packed``, and
``NAME.weight_scale`` and its like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flowprefill.errors import CheckpointError
from flowprefill.models.quantisation import Quantisation, Scheme, Shape

FLOATS = ("BF16", "F16", "F32")
E4M3 = "E4M3"  # type of FP8 weights with a scale for each row, as Checkpoint names types
_SCALES = (*FLOATS, "F8_E8M0")
_SLAB = 1 << 18  # elements that are scaled at a time, in a cache
_WORD_BITS = 32
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its dtype as safetensors calls it, and its shape."""

    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """One matrix, its values and what belongs to them by the files' names; checked.

    Attributes:
        name: ``NAME.weight``, which need not be stored.
        shape: [out, in].
        parts: every stored tensor that belongs to it.
        zero_points: empty: none.
        groups: name of the group of each column, [in]; empty: groups are in order.
    """

    name: str
    shape: Shape
    scheme: Scheme
    parts: tuple[str, ...]
    values: str
    scales: str
    zero_points: str = ""
    groups: str = ""

    def dequantise(self, read: Read) -> torch.Tensor:
        """Return the matrix as float32 [out, in]: each product is rounded once.

        Args:
            read: gives a stored tensor by its name.

        Raises:
            CheckpointError: a column has a group that does not exist.
        """
        rows, columns = self.shape
        stored = read(self.values)
        values = np.empty(self.shape, np.float32)
        down, across = self.scheme.grid(self.shape)
        scales = read(self.scales).float().reshape(down, across).numpy()
        zero_points = self._zero_points(read, down, across)
        column_of = self._column_groups(read, across).numpy()
        slab_rows = max(_SLAB // columns, 1)
        # By numpy, in this thread: torch's threads would wait for busy cores at every step.
        for start in range(0, rows, slab_rows):
            slab = values[start : start + slab_rows]
            slab[:] = self._numbers(stored[start : start + slab_rows])
            row_of = np.arange(start, start + len(slab)) // (self.scheme.rows or rows)
            if zero_points is not None:
                slab -= zero_points[row_of].take(column_of, axis=1)
            slab *= scales[row_of].take(column_of, axis=1)
        return torch.from_numpy(values)

    @property
    def is_e4m3_by_rows(self) -> bool:
        """Whether it is FP8 with a scale for each row, or one for all: see `e4m3_rows`."""
        return self.scheme.is_float and self.scheme.rows <= 1 and not self.scheme.columns

    def e4m3_rows(self, read: Read) -> torch.Tensor:
        """Return the matrix as it is stored: uint8 [out, in + 4], codes and then a float32 scale.

        Args:
            read: gives a stored tensor by its name.
        """
        codes = read(self.values).view(torch.uint8)
        scales = read(self.scales).float().reshape(-1, 1).expand(self.shape[0], 1).contiguous()
        return torch.cat([codes, scales.view(torch.uint8)], dim=1)

    def _numbers(self, stored: torch.Tensor) -> npt.NDArray[Any]:
        """Return stored values as numbers of whatever dtype."""
        if stored.dtype is torch.int32:
            return _unpacked(stored.numpy(), self.scheme.bits, self.shape[1])
        if stored.dtype is torch.float8_e4m3fn:  # torch converts a byte at a time, 4 times slower
            return _E4M3.take(stored.view(torch.uint8).numpy())
        return stored.numpy()

    def _zero_points(self, read: Read, down: int, across: int) -> npt.NDArray[np.float32] | None:
        if not self.zero_points:
            return None
        stored = read(self.zero_points)
        if stored.dtype is torch.int32:  # packed along the rows
            return _unpacked(stored.numpy().T, self.scheme.bits, down).T.astype(np.float32)
        return stored.float().reshape(down, across).numpy()

    def _column_groups(self, read: Read, across: int) -> torch.Tensor:
        columns = self.shape[1]
        if not self.groups:
            return torch.arange(columns) // (self.scheme.columns or columns)
        groups = read(self.groups).long()
        if int(groups.min()) < 0 or int(groups.max()) >= across:
            got = f"{int(groups.min())}..{int(groups.max())}"
            raise _bad(self.groups, f"got groups {got}, expected 0..{across - 1}")
        return groups


def find_quantised(
    quantisation: Quantisation, stored: Mapping[str, Stored], read: Read
) -> dict[str, QuantisedWeight]:
    """Find the quantised weights; reads nothing but the shapes of packed ones.

    Returns:
        By the name of the weight, ``NAME.weight``.

    Raises:
        CheckpointError: something that belongs to a weight is missing, or has a dtype or a shape
            that does not fit; names that tensor.
    """
    finder = _Finder(quantisation, stored, read)
    values = [name for name, tensor in stored.items() if finder.is_quantised(name, tensor)]
    found = [finder.weight(name) for name in values]
    return {weight.name: weight for weight in found}


class _Finder:
    """Finds what belongs to values, and checks that it fits."""

    def __init__(
        self, quantisation: Quantisation, stored: Mapping[str, Stored], read: Read
    ) -> None:
        self._quantisation, self._stored, self._read = quantisation, stored, read

    def is_quantised(self, name: str, tensor: Stored) -> bool:
        """Whether a tensor has the values of a quantised weight."""
        if not self._quantisation.schemes:
            return False
        is_plain = name.endswith(".weight") and tensor.dtype in ("F8_E4M3", "I8")
        return is_plain or name.endswith(".weight_packed")

    def weight(self, values: str) -> QuantisedWeight:
        """Gather what belongs to values."""
        module = values.rpartition(".")[0]
        is_packed = values.endswith("_packed")
        shape_name = f"{module}.weight_shape" if is_packed else ""
        shape = self._unpacked_shape(shape_name) if is_packed else self._stored[values].shape
        if len(shape) != 2 or min(shape) < 1:
            raise _bad(values, f"got shape {list(shape)} quantised, expected a matrix")
        schemes = self._fitting(values, shape)
        scales, scheme = self._scales(module, shape, schemes)
        zero_points = self._zero_points(module, shape, scheme, self._stored[scales].shape)
        groups = self._groups(module, shape, scheme)
        parts = tuple(filter(None, (values, shape_name, scales, zero_points, groups)))
        name = f"{module}.weight"
        return QuantisedWeight(name, shape, scheme, parts, values, scales, zero_points, groups)

    def _unpacked_shape(self, name: str) -> Shape:
        self._need(name, ("I64", "I32"), [(2,)])
        return tuple(int(extent) for extent in self._read(name))

    def _fitting(self, values: str, shape: Shape) -> list[Scheme]:
        """Return the schemes with which values may have been stored as they are."""
        tensor = self._stored[values]
        schemes = [one for one in self._quantisation.schemes if one.fits(tensor.dtype)]
        if not schemes:
            allowed = [one for one in ("F8_E4M3", "I8", "I32") if self._is_allowed(one)]
            raise _bad(values, f"got dtype {tensor.dtype}, expected {_one_of(allowed)}")
        if not values.endswith("_packed"):
            return schemes
        packed: list[Shape] = [(shape[0], _words(shape[1], one.bits)) for one in schemes]
        if tensor.dtype != "I32" or tensor.shape not in packed:
            self._need(values, ("I32",), packed)
        return [one for one, size in zip(schemes, packed, strict=True) if size == tensor.shape]

    def _is_allowed(self, dtype: str) -> bool:
        return any(scheme.fits(dtype) for scheme in self._quantisation.schemes)

    def _scales(self, module: str, shape: Shape, schemes: list[Scheme]) -> tuple[str, Scheme]:
        names = [f"{module}.{name}" for name in self._quantisation.scale_names]
        name = next((one for one in names if one in self._stored), names[0])
        self._need(name, _SCALES, [size for one in schemes for size in one.scale_shapes(shape)])
        stored = self._stored[name].shape
        return name, next(one for one in schemes if stored in one.scale_shapes(shape))

    def _zero_points(self, module: str, shape: Shape, scheme: Scheme, scales: Shape) -> str:
        name = f"{module}.weight_zero_point"
        if name not in self._stored and scheme.is_symmetric:
            return ""
        if name in self._stored and self._stored[name].dtype == "I32":
            down, across = scheme.grid(shape)
            self._need(name, ("I32",), [(_words(down, scheme.bits), across)])
        else:
            self._need(name, ("I8", "F8_E4M3", *FLOATS), [scales])
        return name

    def _groups(self, module: str, shape: Shape, scheme: Scheme) -> str:
        name = f"{module}.weight_g_idx"
        if name not in self._stored or scheme.rows != 1 or not scheme.columns:
            return ""
        self._need(name, ("I32", "I64"), [shape[1:]])
        return name

    def _need(self, name: str, dtypes: Iterable[str], shapes: list[Shape]) -> None:
        """Refuse a tensor that is missing, or has another dtype or shape."""
        listed = _one_of([str(list(shape)) for shape in dict.fromkeys(shapes)])
        if name not in self._stored:
            raise _bad(name, f"missing, expected shape {listed}")
        tensor = self._stored[name]
        if tensor.dtype not in dtypes:
            raise _bad(name, f"got dtype {tensor.dtype}, expected {_one_of(list(dtypes))}")
        if tensor.shape not in shapes:
            raise _bad(name, f"got shape {list(tensor.shape)}, expected {listed}")


def _words(values: int, bits: int) -> int:
    """Return how many words of 32 bits hold so many values."""
    return -(-values * bits // _WORD_BITS)


def _unpacked(words: npt.NDArray[np.int32], bits: int, columns: int) -> npt.NDArray[np.int16]:
    """Unpack [rows, words] into [rows, columns]; the lowest bits come first.

    Values are stored without a sign, with half of their range added.
    """
    octets = np.ascontiguousarray(words).view(np.uint8)  # on little-endian processors, as torch's
    if bits == 4:
        octets = np.stack((octets & 15, octets >> 4), axis=2).reshape(len(octets), -1)
    return octets[:, :columns].astype(np.int16) - np.int16(1 << (bits - 1))


def _one_of(allowed: list[str]) -> str:
    return allowed[0] if len(allowed) == 1 else "one of " + ", ".join(allowed)


def _bad(name: str, what: str) -> CheckpointError:
    return CheckpointError(f"tensor {name}: {what}", param=name)
