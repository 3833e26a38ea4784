"""Where nvcc, libcudart_static and cuobjdump are: toolkit or pip packages. For check_kernels.py."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

NVCC_PACKAGES = (
    "nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 "
    "nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85"
)
READER_PACKAGES = "nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51"


class MissingToolError(Exception):
    """A tool is nowhere; the message says how to get it."""


@dataclass(frozen=True)
class Toolchain:
    """The programs and libraries of one build.

    Attributes:
        root: folder with bin/ and include/.
        nvcc: the compiler driver.
        cudart: static runtime that the module links.
        cuobjdump: reader of machine code; nvdisasm lies next to it or in PATH.
    """

    root: Path
    nvcc: Path
    cudart: Path
    cuobjdump: Path

    def environment(self) -> dict[str, str]:
        """Return os.environ with this interpreter's cmake and ninja and the tools' folders."""
        env = dict(os.environ)
        here = Path(sys.executable).parent
        bins = [str(here), str(self.cuobjdump.parent), str(self.nvcc.parent)]
        env["PATH"] = os.pathsep.join([*bins, env.get("PATH", "")])
        env["CUDA_HOME"] = str(self.root)  # the build is to take this one too
        return env


def packaged_root() -> Path:
    """Return where NVIDIA's CUDA 13 packages put bin, include and lib in this environment."""
    return Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"


def _roots() -> list[Path]:
    """Return folders that may be a toolkit, the one named by the user first."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    around = [Path(on_path).resolve().parent.parent] if on_path else []
    usual = sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    return [*named, *around, *usual, packaged_root()]


def _find_cudart(root: Path) -> Path | None:
    """Return libcudart_static.a of a toolkit or of the packages."""
    found = (root / folder / "libcudart_static.a" for folder in ("lib64", "lib"))
    return next((path for path in found if path.exists()), None)


def _find_cuobjdump(root: Path) -> Path | None:
    on_path = shutil.which("cuobjdump")
    places = [root / "bin", packaged_root() / "bin"]
    found = [place / "cuobjdump" for place in places if (place / "cuobjdump").exists()]
    return found[0] if found else (Path(on_path) if on_path else None)


def find_toolchain() -> Toolchain:
    """Look for a compiler with headers and runtime, then for a reader.

    Raises:
        MissingToolError: there is none; says what was looked for and what to install.
    """
    for root in _roots():
        nvcc = root / "bin" / "nvcc"
        cudart = _find_cudart(root)
        has_headers = (root / "include" / "cuda_runtime_api.h").exists()
        if not (nvcc.exists() and cudart and has_headers):
            continue
        cuobjdump = _find_cuobjdump(root)
        if cuobjdump is None:
            raise MissingToolError(f"no cuobjdump: pip install {READER_PACKAGES}")
        return Toolchain(root, nvcc, cudart, cuobjdump)
    looked = ", ".join(str(root) for root in _roots())
    raise MissingToolError(
        f"no nvcc with headers and libcudart_static.a in {looked}: set CUDA_HOME or pip install "
        f"{NVCC_PACKAGES}"
    )
