"""Builds flowprefill/_core with CMake and Ninja; for pip and `make build`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULE = "flowprefill/_core" + sysconfig.get_config_var("EXT_SUFFIX")


def find_tool(name: str) -> str:
    """Return the path of a build tool, the environment's own before the system's."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=search)
    if found is None:
        sys.exit(f"flowprefill needs {name} to build: pip install {name}")
    return found


def build_folder() -> Path:
    """Return one folder for this environment's torch, another for pip's isolated builds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("flowprefill needs torch to build: pip install torch==2.13.0")
    is_own = Path(spec.origin).is_relative_to(sysconfig.get_path("platlib"))
    return ROOT / "build" / ("cmake" if is_own else "cmake-isolated")


def run_tool(*command: str) -> None:
    """Run one build step; if it fails end without a traceback below the compiler's messages."""
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        sys.exit(f"failed with status {status}: {' '.join(command)}")


class CMakeBuild(build_ext):
    """Hand the one extension to CMake, then place the file where setuptools expects it."""

    def run(self) -> None:
        cmake, folder = find_tool("cmake"), build_folder()
        settings = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "FP_WERROR": "ON" if os.environ.get("CI") == "true" else "OFF",
        }
        source_and_build = ["-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
        run_tool(cmake, *source_and_build, *(f"-D{key}={value}" for key, value in settings.items()))
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0))))
        run_tool(cmake, "--build", str(folder), "--parallel", jobs)
        self._place(cmake, folder)

    def _place(self, cmake: str, folder: Path) -> None:
        """Copy next to the sources (finds this torch) or install for a wheel (any beside it)."""
        if self.inplace:
            target = ROOT / MODULE
            fresh = target.with_suffix(".new")
            shutil.copy2(folder / "lib" / target.name, fresh)
            fresh.replace(target)  # never writes into a file that a running process has mapped
            return
        prefix = ["--prefix", str(Path(self.build_lib).resolve())]
        run_tool(cmake, "--install", str(folder), *prefix, "--component", "python", "--strip")


setup(ext_modules=[Extension("flowprefill._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
