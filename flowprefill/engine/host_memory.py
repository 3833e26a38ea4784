"""What memory this machine has for a model's weights, and what they need; devices ask at load.

The kernel hands memory out when it is first written. Without a look before, a model that is too
large would be read for minutes, and its process ended without a word.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flowprefill.engine.control_groups import SYSTEM, memory_left
from flowprefill.models.checkpoint import block_bytes

if TYPE_CHECKING:
    from flowprefill.models.graph import ModelGraph


class Room(NamedTuple):
    """Memory that this process may still take, bytes, and what bounds it, in words."""

    bytes: int
    bound: str


def available(root: Path = SYSTEM) -> tuple[Room, Room]:
    """Return what cannot be exceeded, and what is free at the moment if that is less.

    The second is the kernel's guess: it knows nothing of caches that others would give up.

    Args:
        root: where /proc and /sys are found.
    """
    machine = _kilobytes(root / "proc/meminfo")
    swap = machine.get("SwapTotal", 0)
    bounds = [Room(machine["MemTotal"] + swap, "all of this machine")] if machine else []
    left = memory_left(root)
    if left is not None:
        bounds.append(Room(left, "the limit of the control group"))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        used = _kilobytes(root / "proc/self/status").get("VmSize", 0)
        bounds.append(Room(max(soft - used, 0), "ulimit -v"))
    most = min(bounds, default=Room(1 << 62, "no limit is known"))
    free = machine.get("MemAvailable", most.bytes) + machine.get("SwapFree", 0)
    return most, min(most, Room(free, "of this machine, at the moment"))


def _kilobytes(path: Path) -> dict[str, int]:
    """Return the lines ``NAME: NUMBER kB`` of a file of /proc, in bytes."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0][:-1]: int(line[1]) << 10 for line in lines if line[2:] == ["kB"]}


def weight_bytes(
    graph: ModelGraph, dtype: str, quantization: str, formats: Mapping[str, str]
) -> int:
    """Return what the CPU keeps a model's weights in, bytes; a percent of padding is left out.

    Args:
        quantization: int8: matrices in 8 bits.
        formats: tensors that stay in their quantised blocks, canonical name -> type.
    """
    total, in_blocks = 0.0, set[object]()
    for weight in graph.weights:
        element_bytes = 2.0 if dtype == "bf16" else 4.0
        kinds = [formats.get(part.source) for part in weight.parts]
        if weight.kind == "vector":
            element_bytes = 4
        elif None not in kinds:
            # A table and a matrix of the same tensor share its blocks.
            element_bytes = 0 if weight.parts in in_blocks else block_bytes(str(kinds[0]))
            in_blocks.add(weight.parts)
        elif weight.kind == "matrix" and quantization == "int8":
            element_bytes = 1
        total += sum(part.rows for part in weight.parts) * weight.columns * element_bytes
    return int(total)


def largest_tensor(graph: ModelGraph) -> int:
    """Return the bytes of the largest tensor as floats, which it becomes while it is read."""
    return 4 * max(math.prod(shape) for shape in graph.sources().values())
