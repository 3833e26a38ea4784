"""Build and run everything that needs a GPU: `make test-gpu`.

Without a GPU it prints one line, why there is none, and ends with status 0: nothing is built. With
one it builds _cuda for that GPU and the C++ tests, runs these, compute-sanitizer over them, and the
device suite (tests/device) on device cuda. Status 1: something failed.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu-tests"
LIBRARY = "libcuda.so.1"
MIN_CAPABILITY = (8, 0)
# Numbers of the driver's interface.
NO_DEVICE, CAPABILITY_MAJOR, CAPABILITY_MINOR = 100, 75, 76


def missing_gpu(library: str = LIBRARY) -> str:
    """Return why no GPU can be used; "" if one can. Asks the driver: nothing has been built yet."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver: {library} cannot be loaded"
    count, code = ctypes.c_int(), driver.cuInit(0)
    if code == 0:
        code = driver.cuDeviceGetCount(ctypes.byref(count))
    if code == NO_DEVICE or (code == 0 and count.value == 0):
        return "the NVIDIA driver sees no GPU"
    if code != 0:
        return f"the NVIDIA driver cannot be used: error {code} of its cuInit"
    found = [_capability(driver, index) for index in range(count.value)]
    if max(found) < MIN_CAPABILITY:
        told = ", ".join(f"{major}.{minor}" for major, minor in found)
        return f"compute capability {told}, 8.0 or higher is needed"
    return ""


def _capability(driver: ctypes.CDLL, index: int) -> tuple[int, int]:
    device, value = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), index)
    found = []
    for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found.append(value.value)
    return found[0], found[1]


class Step(NamedTuple):
    """One command; without a build the others mean nothing, tests do not depend on each other."""

    name: str
    command: list[str]
    is_build: bool = True


def steps() -> list[Step]:
    """Return what is run, in order."""
    python = sys.executable
    configure = [
        "cmake", "-S", str(ROOT / "tests/gpu/cpp"), "-B", str(BUILD), "-G", "Ninja",
        f"-DPython_EXECUTABLE={python}", "-DFP_CUDA_ARCHITECTURES=native",
    ]  # fmt: skip
    return [
        Step("tools of the build", ["make", "-s", ".venv/.cuda-compile"]),
        Step("build of _cuda", [python, "setup.py", "-q", "build_ext", "--inplace"]),
        Step("configuration of the C++ tests", configure),
        Step("build of the C++ tests", ["cmake", "--build", str(BUILD)]),
        Step("C++ tests", ["ctest", "--test-dir", str(BUILD), "--output-on-failure"], False),
        Step("Python tests", [python, "-m", "pytest", "tests/device", "-m", "gpu"], False),
    ]


def run_steps() -> int:
    """Run the steps: a build that fails ends it, tests that fail let the other tests run."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    settings = {"FLOWPREFILL_CUDA": "1", "FLOWPREFILL_CUDA_ARCHITECTURES": "native", "PATH": tools}
    failed = []
    for step in steps():
        done = subprocess.run(step.command, cwd=ROOT, env=os.environ | settings, check=False)
        if done.returncode != 0:
            failed.append(step.name)
            if step.is_build:
                break
    if failed:
        print(f"test-gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    """Skip with the reason, or build and run."""
    if reason := missing_gpu():
        print(f"test-gpu: skipped: {reason}")
        return 0
    return run_steps()


if __name__ == "__main__":
    sys.exit(main())
