"""Builds flowprefill/_core and, for GPUs, flowprefill/_cuda with CMake; for pip and `make build`.

FLOWPREFILL_CUDA=1 demands _cuda, 0 leaves it out; unset: cmake/CudaToolkit.cmake decides.
FLOWPREFILL_CUDA_ARCHITECTURES chooses what its kernels are compiled for, e.g. 80-real;90-real.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
ARCHITECTURES = "80-real;90-real;100"  # as cmake/CudaToolkit.cmake; 100 brings PTX for newer ones
CUDA_CHOICES = {"": "AUTO", "auto": "AUTO", "1": "ON", "on": "ON", "0": "OFF", "off": "OFF"}


def build_requirements() -> list[str]:
    """Return what pyproject.toml says that a build needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements: list[str] = project["build-system"]["requires"]
    return requirements


def find_tool(name: str) -> str:
    """Return the path of a build tool, the environment's own before the system's."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=search)
    if found is None:
        wanted = next(text for text in build_requirements() if text.startswith(name))
        sys.exit(f"flowprefill needs {name} to build: pip install '{wanted}'")
    return found


def is_isolated() -> bool:
    """Tell whether torch is that of an environment which pip deletes after the build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("flowprefill needs torch to build: pip install torch==2.13.0")
    return not Path(spec.origin).is_relative_to(sysconfig.get_path("platlib"))


def run_tool(*command: str) -> None:
    """Run one build step; if it fails end without a traceback below the compiler's messages."""
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        sys.exit(f"failed with status {status}: {' '.join(command)}")


def cuda_settings() -> dict[str, str]:
    """Return CMake's settings of _cuda by the environment."""
    asked = os.environ.get("FLOWPREFILL_CUDA", "").lower()
    if asked not in CUDA_CHOICES:
        sys.exit(f"FLOWPREFILL_CUDA: got {asked!r}, expected 1, 0 or auto")
    architectures = os.environ.get("FLOWPREFILL_CUDA_ARCHITECTURES") or ARCHITECTURES
    return {
        "FP_CUDA": CUDA_CHOICES[asked],
        "FP_CUDA_ARCHITECTURES": architectures.replace(",", ";").replace(" ", ""),
    }


def built_modules(folder: Path) -> list[str]:
    """Return what this build folder is configured to build."""
    has_cuda = "FP_CUDA_ENABLED:INTERNAL=ON" in (folder / "CMakeCache.txt").read_text().splitlines()
    return ["_core", "_cuda"] if has_cuda else ["_core"]


class CMakeBuild(build_ext):
    """Hand the extensions to CMake, then place the files where setuptools expects them."""

    def run(self) -> None:
        cmake, isolated = find_tool("cmake"), is_isolated()
        folder = ROOT / "build" / ("cmake-isolated" if isolated else "cmake")
        settings = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "FP_IN_PLACE": "ON" if self.inplace and not isolated else "OFF",
            "FP_WERROR": "ON" if os.environ.get("CI") == "true" else "OFF",
            **cuda_settings(),
        }
        source_and_build = ["-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        run_tool(cmake, *source_and_build, *(f"-D{key}={value}" for key, value in settings.items()))
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0))))
        run_tool(cmake, "--build", str(folder), "--parallel", jobs)
        self._place(cmake, folder)

    def _place(self, cmake: str, folder: Path) -> None:
        """Copy next to the sources (finds this torch) or install for a wheel (finds any)."""
        if not self.inplace:
            prefix = ["--prefix", str(Path(self.build_lib).resolve())]
            run_tool(cmake, "--install", str(folder), *prefix, "--component", "python", "--strip")
            return
        built = built_modules(folder)
        for module in ("_core", "_cuda"):
            target = ROOT / "flowprefill" / (module + SUFFIX)
            if module not in built:
                target.unlink(missing_ok=True)  # of a build with other settings, perhaps old
                continue
            fresh = target.with_suffix(".new")
            shutil.copy2(folder / "lib" / target.name, fresh)
            fresh.replace(target)  # never writes into a file that a running process has mapped


def description() -> str:
    """Return the README for a page that has no files with it: no pictures, links as their text."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r":\n\n(?=!\[)", ".\n\n", text)  # a sentence that announces a picture
    text = re.sub(r"^!\[[^]]*\]\((?!https?:)[^)]*\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


setup(
    ext_modules=[Extension("flowprefill._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    long_description=description(),
    long_description_content_type="text/markdown",
)
