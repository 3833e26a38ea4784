"""Reads a CUDA binary: per kernel and architecture registers, memory, matrix instructions, spills.

Used by check_kernels.py. Works on the text of `cuobjdump -res-usage` and `cuobjdump -sass`.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field

_ARCH = re.compile(r"arch = (sm_\w+)")
_FUNCTION = re.compile(r"^\s*Function\s*:?\s*([^\s:]+)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# /*0a30*/  @!P0 HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")

# Loads from and stores to a thread's local memory: what a spilled register becomes.
LOCAL_MEMORY = ("LDL", "STL")


@dataclass
class Kernel:
    """One kernel's code for one architecture."""

    mangled: str
    arch: str
    registers: int = -1
    stack: int = -1
    local: int = -1
    shared: int = -1
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, *names: str) -> int:
        """Return how many instructions of these names the code has."""
        return sum(self.counts.get(name, 0) for name in names)


Kernels = dict[tuple[str, str], Kernel]


def read_usage(text: Iterable[str]) -> Kernels:
    """Parse `cuobjdump -res-usage`."""
    kernels: Kernels = {}
    arch = name = ""
    for line in text:
        if match := _ARCH.search(line):
            arch = match[1]
        elif match := _USAGE.search(line):
            registers, stack, shared, local = map(int, match.groups())
            kernels[name, arch] = Kernel(name, arch, registers, stack, local, shared)
        elif match := _FUNCTION.match(line):
            name = match[1]
    return kernels


def count_instructions(text: Iterable[str], kernels: Kernels) -> None:
    """Parse `cuobjdump -sass` and add the counts to `kernels`."""
    arch = ""
    kernel: Kernel | None = None
    for line in text:
        if match := _INSTRUCTION.match(line):
            if kernel is not None:
                kernel.counts[match[1]] = kernel.counts.get(match[1], 0) + 1
        elif match := _ARCH.search(line):
            arch = match[1]
        elif match := _FUNCTION.match(line):
            kernel = kernels.setdefault((match[1], arch), Kernel(match[1], arch))


def demangle(names: list[str]) -> dict[str, str]:
    """Return the C++ names, by binutils' c++filt (-r: CUTLASS nests deeper than its limit)."""
    done = subprocess.run(
        ["c++filt", "-r"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def short_name(name: str) -> str:
    """Return a readable name: CUTLASS's are thousands of characters long."""
    output = "bf16" if re.search(r"BiasElementwise<cutlass::bf|Bias<cutlass::bf", name) else "float"
    if match := re.search(r"GemmShape<(\d+), (\d+), (\d+)>", name):
        if "GatedStore" in name:
            return f"gemm_gated_ampere_{match[1]}x{match[2]}"
        return f"gemm_ampere_{match[1]}x{match[2]}<{output}>"
    if "PrefillWithKVCacheKernel" in name:
        dim = re.search(r"HopperTraits<(\d+)", name)
        window = ", window" if re.search(r", true, true, [^,]*TileScheduler", name) else ""
        cap = ", cap" if "BaseTwoScores<true>" in name else ""
        return f"attention_hopper<{dim[1]}{window}{cap}>" if dim else "attention_hopper"
    if "CollectiveMma" in name:
        tile = re.search(r"C<(\d+)>, cute::C<(\d+)>, cute::C<64>", name)
        return f"gemm_hopper_{tile[1]}x{tile[2]}<{output}>" if tile else "gemm_hopper"
    match = re.search(r"(\w+_kernel(?:<[^>(]*>)?)\(", name)
    if match is None:
        return name
    return match[1].replace("unsigned short", "bf16").replace("flowprefill::", "").lower()
