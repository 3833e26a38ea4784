"""Build flowprefill._cuda with nvcc, then check its code: `make cuda-compile`.

Needs no GPU. Exit status: 0 all checks hold; 1 something failed; 77 a tool is missing (named).
What it shows: the whole module compiles and links for every architecture, matrix products use the
tensor cores, no shipped kernel spills registers, importing needs no driver and a missing one is
named. What it cannot show: that a kernel computes the right thing or is fast; none is executed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from machine_code import (
    LOCAL_MEMORY,
    Kernel,
    Kernels,
    count_instructions,
    demangle,
    read_usage,
    short_name,
)
from toolchain import MissingToolError, Toolchain, find_toolchain

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 77

# Kernels by architecture, and the matrix instruction that those in the last column must use.
PORTABLE = (
    "attention_merge_kernel<64>", "attention_merge_kernel<96>",
    "attention_merge_kernel<128>", "attention_merge_kernel<256>", "embed_kernel",
    "gate_kernel<bf16>", "gate_kernel<float>", "pool_kernel", "quantise_kernel",
    "rescale_kernel", "residual_kernel", "rms_norm_kernel<bf16>", "rms_norm_kernel<float>",
    "rotary_kernel", "round_kernel", "rope_kernel<bf16>", "rope_kernel<float>",
    "rope_rows_kernel<bf16>", "rope_rows_kernel<float>", "sample_kernel", "score_kernel",
    "softcap_kernel", "widen_kernel",
)  # fmt: skip
TENSOR_CORE = (
    "attention_kernel<64>", "attention_kernel<96>", "attention_kernel<128>",
    "attention_kernel<256>",
    *(f"few_rows_kernel<{tiles}, {element}, false, false>"
      for tiles in (1, 2) for element in ("bf16", "e4m3")),
    *(f"few_rows_kernel<1, bf16, {fused}>"
      for fused in ("true, true", "true, false", "false, true")),
    "gemm_ampere_64x64<bf16>", "gemm_ampere_64x64<float>",
    "gemm_ampere_128x128<bf16>", "gemm_ampere_128x128<float>",
    "gemm_ampere_256x128<bf16>", "gemm_ampere_256x128<float>",
    "gemm_gated_ampere_64x64", "gemm_gated_ampere_128x128", "gemm_gated_ampere_256x128",
)  # fmt: skip
HOPPER_PLAIN = tuple(f"attention_merge_rows_kernel<{dim}>" for dim in (64, 128, 256))
HOPPER = (
    *(f"attention_hopper<{dim}{form}>" for dim in (64, 128, 256)
      for form in ("", ", window", ", window, cap")),
    "gemm_hopper_128x256<bf16>", "gemm_hopper_128x256<float>",
)  # fmt: skip
EXPECTED = {
    "sm_80": (PORTABLE, TENSOR_CORE, "HMMA"),
    "sm_90": (PORTABLE, TENSOR_CORE, "HMMA"),
    "sm_90a": (HOPPER_PLAIN, HOPPER, "HGMMA"),
    "sm_100": (PORTABLE, TENSOR_CORE, "HMMA"),
}


def build(tools: Toolchain, folder: Path, jobs: int) -> Path:
    """Configure and build as setup.py does, but for this module alone; return it.

    Raises:
        subprocess.CalledProcessError: a step failed; its output is on the terminal.
    """
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DFP_CUDA=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DFP_WERROR={'ON' if os.environ.get('CI') == 'true' else 'OFF'}",
    ]  # fmt: skip
    env = tools.environment()
    subprocess.run(configure, env=env, check=True, stdout=subprocess.DEVNULL)
    build_module = ["cmake", "--build", str(folder), "--target", "_cuda", "-j", str(jobs)]
    subprocess.run(build_module, env=env, check=True)
    return folder / "lib" / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))


# Executed by a fresh interpreter: torch is not to be loaded by it, nor a driver to be there.
IMPORT = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps([module.device_count(), *module.availability()]))
"""


def import_failures(library: Path) -> list[str]:
    """Import the module; return what does not hold of what it says about this machine."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return [f"the module cannot be imported: {done.stderr.strip().splitlines()[-1]}"]
    count, is_available, reason = json.loads(done.stdout)
    print(f"\nimported: {count} devices; {'usable' if is_available else 'not usable'}: {reason}")
    found = [] if reason else ["availability() gives no reason"]
    has_driver = Path("/proc/driver/nvidia/version").exists()
    if not has_driver and (count, is_available) != (0, False):
        found.append(f"there is no driver, but it sees {count} devices: {reason}")
    if not has_driver and "driver" not in reason:
        found.append(f"there is no driver, but the reason is: {reason}")
    return found


def read(tools: Toolchain, library: Path) -> tuple[Kernels, set[str]]:
    """Return the library's kernels and the architectures it carries PTX of."""

    def lines(*options: str) -> list[str]:
        done = subprocess.run(
            [str(tools.cuobjdump), *options, str(library)],
            env=tools.environment(), capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.splitlines()

    kernels = read_usage(lines("-res-usage"))
    count_instructions(lines("-sass"), kernels)
    ptx = {line.rsplit(".", 2)[-2] for line in lines("-lptx") if line.endswith(".ptx")}
    return kernels, ptx


def print_table(named: dict[tuple[str, str], Kernel]) -> None:
    """Print one line per kernel and architecture."""
    print(f"\n{'kernel':32}{'arch':>8}{'registers':>11}{'static shared':>15}{'stack':>7}"
          f"{'local loads, stores':>21}{'HMMA':>7}{'HGMMA':>7}")  # fmt: skip
    for (arch, name), k in sorted(named.items()):
        print(f"{name:32}{arch:>8}{k.registers:>11}{k.shared:>15}{k.stack:>7}"
              f"{k.count(*LOCAL_MEMORY):>21}{k.count('HMMA'):>7}{k.count('HGMMA'):>7}")  # fmt: skip


def failures(named: dict[tuple[str, str], Kernel], ptx: set[str]) -> list[str]:
    """Return what does not hold, one sentence each."""
    found = []
    for arch, (plain, products, instruction) in EXPECTED.items():
        have = {name for of_arch, name in named if of_arch == arch}
        wanted = {*plain, *products}
        found += [f"{arch}: {name} is missing" for name in sorted(wanted - have)]
        found += [f"{arch}: {name} is not in the list" for name in sorted(have - wanted)]
        found += [
            f"{arch}: {name} has no {instruction}"
            for name in products
            if name in have and named[arch, name].count(instruction) == 0
        ]
    for (arch, name), kernel in named.items():
        if kernel.registers < 0:
            found.append(f"{arch}: {name}: no resource usage")
        if kernel.count("STG", "ST", "UTMASTG") == 0:  # as when a body calls what is the host's
            found.append(f"{arch}: {name} stores nothing")
        if kernel.stack > 0 or kernel.local > 0 or kernel.count(*LOCAL_MEMORY) > 0:
            found.append(f"{arch}: {name} uses local memory (spilled registers)")
    if "sm_100" not in ptx:
        found.append(f"no PTX of sm_100 (there is: {', '.join(sorted(ptx)) or 'none'})")
    return found


def main() -> int:
    """Build, read, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build-folder", type=Path, default=ROOT / "build" / "cuda-module")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once (up to 4 GB each)")
    options = parser.parse_args()
    try:
        tools = find_toolchain()
    except MissingToolError as error:
        print(f"cuda-compile: SKIPPED, {error}", file=sys.stderr)
        return SKIPPED
    start = time.monotonic()
    print(f"nvcc: {tools.nvcc}\ncudart: {tools.cudart}\ncuobjdump: {tools.cuobjdump}", flush=True)
    library = build(tools, options.build_folder, options.jobs)
    kernels, ptx = read(tools, library)
    names = demangle(sorted({mangled for mangled, _ in kernels}))
    named = {(k.arch, short_name(names[k.mangled])): k for k in kernels.values()}
    print_table(named)
    found = failures(named, ptx) + import_failures(library)
    if len(named) != len(kernels):
        found.append(f"{len(kernels)} kernels but {len(named)} names: short_name() is ambiguous")
    for sentence in found:
        print(f"FAILED {sentence}")
    seconds = time.monotonic() - start
    print(f"\n{len(named)} kernels, {library.stat().st_size / 1e6:.1f} MB, PTX: "
          f"{', '.join(sorted(ptx))}; {seconds:.0f} s; "
          f"{'FAILED' if found else 'all checks hold'}")  # fmt: skip
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
