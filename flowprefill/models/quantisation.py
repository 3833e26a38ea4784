"""Quantisation: how the weights of a folder are quantised, as its config.json says; see hf_folder.

What is stored decides which weights are quantised: lists of targets and exceptions are not needed
for it, and their patterns, which anyone may have written, are never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowprefill.models.hf_config import HfConfig
from flowprefill.models.model_config import bad_field

_FIELD = "quantization_config"
_FORMATS = (
    "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision",
)  # fmt: skip
_STRATEGIES = ("tensor", "channel", "group", "block")
PACKED_BITS = (4, 8)
# Of activations and of caches of keys and values, which are not quantised here.
_OTHER_SCALES = {
    "input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale",
    "q_scale", "k_scale", "v_scale", "kv_scale",
}  # fmt: skip

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to quantise a matrix: (stored value - zero point) * scale.

    Attributes:
        is_float: values are FP8 (e4m3), else integers.
        bits: of a value.
        rows: so many rows share a scale; 0: all.
        columns: so many columns share a scale; 0: all.
        is_symmetric: there are no zero points.
    """

    is_float: bool
    bits: int
    rows: int = 0
    columns: int = 0
    is_symmetric: bool = True

    def fits(self, dtype: str) -> bool:
        """Whether values of it are stored in a dtype of safetensors; I32: packed."""
        if self.is_float:
            return dtype == "F8_E4M3"
        return dtype == "I8" or (dtype == "I32" and self.bits in PACKED_BITS)

    def grid(self, shape: Shape) -> tuple[int, int]:
        """Return how many scales there are, down and across, of a matrix of at least 1 x 1."""
        rows, columns = shape
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))

    def scale_shapes(self, shape: Shape) -> list[Shape]:
        """Return the shapes in which the scales of a matrix may be stored; the usual one first."""
        down, across = self.grid(shape)
        shorter: list[Shape] = [(down,)] if across == 1 else []
        return [(down, across), *shorter, *([()] if down == across == 1 else [])]


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What a folder says of its quantised weights.

    Attributes:
        schemes: any of which a weight may have; none: no weight is quantised.
        scale_names: what the scale next to a ``weight`` is called.
    """

    schemes: tuple[Scheme, ...] = ()
    scale_names: tuple[str, ...] = ("weight_scale",)

    def is_read_past(self, stored: str) -> bool:
        """Whether a tensor belongs to quantised activations, or to a quantised cache."""
        return bool(self.schemes) and stored.rpartition(".")[2] in _OTHER_SCALES


def read_quantisation(values: Mapping[str, Any]) -> Quantisation:
    """Read ``quantization_config`` of a parsed config.json; absent or null: nothing is quantised.

    Raises:
        CheckpointError: a method, format or scheme that is not read; names the field, what it is
            and what is allowed.
    """
    if values.get(_FIELD) is None:
        return Quantisation()
    given = HfConfig(values).inside(_FIELD)
    method = given.choice("quant_method", ("fp8", "compressed-tensors"))
    return _read_fp8(given) if method == "fp8" else _read_compressed(given)


def _read_fp8(given: HfConfig) -> Quantisation:
    given.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    rows, columns = _block(given, "weight_block_size") or (0, 0)
    scheme = Scheme(is_float=True, bits=8, rows=rows, columns=columns)
    return Quantisation((scheme,), ("weight_scale_inv", "weight_scale"))


def _read_compressed(given: HfConfig) -> Quantisation:
    given.choice("format", _FORMATS)
    given.inside("sparsity_config").choice("format", ("dense",), "dense")
    if given.mapping("transform_config"):
        name = f"{_FIELD}.transform_config"
        raise bad_field(name, given.values["transform_config"], "none: weights as they are")
    groups = given.inside("config_groups")
    schemes = [_read_group(groups.inside(name)) for name in groups.values]
    if not any(schemes):
        raise bad_field(groups.path[:-1], groups.values, "a group that has weights")
    return Quantisation(tuple(scheme for scheme in schemes if scheme))


def _read_group(group: HfConfig) -> Scheme | None:
    """Read one of config_groups; None: it has activations only."""
    group.choice("format", _FORMATS, _FORMATS[0])
    weights = group.inside("weights")
    if not weights.values:
        return None
    is_float = weights.choice("type", ("int", "float"), "int") == "float"
    bits = weights.integer("num_bits", 8)
    if not (bits == 8 if is_float else 1 <= bits <= 8):
        raise bad_field(f"{weights.path}num_bits", bits, "8, or of integers 1..8")
    rows, columns = _shared(weights)
    return Scheme(is_float, bits, rows, columns, weights.flag("symmetric", True))


def _shared(weights: HfConfig) -> tuple[int, int]:
    """Return how many rows and columns share a scale; 0: all."""
    size = weights.integer("group_size", 0)
    by_size = "group" if size > 0 else "channel" if size < 0 else "tensor"
    strategy = weights.choice("strategy", _STRATEGIES, by_size)
    if strategy == "group":
        if size < 1:
            raise bad_field(f"{weights.path}group_size", size, "an integer >= 1")
        return 1, size
    if strategy == "block":
        block = _block(weights, "block_structure")
        if block is None:
            raise bad_field(f"{weights.path}block_structure", None, "two integers >= 1")
        return block
    return (1, 0) if strategy == "channel" else (0, 0)


def _block(given: HfConfig, name: str) -> tuple[int, int] | None:
    """Read rows and columns of a block; None: there is none."""
    value = given.values.get(name)
    if value is None:
        return None
    is_pair = isinstance(value, list) and len(value) == 2
    if not is_pair or any(type(one) is not int or not 1 <= one < 2**31 for one in value):
        raise bad_field(given.path + name, value, "two integers >= 1, or null")
    return value[0], value[1]
