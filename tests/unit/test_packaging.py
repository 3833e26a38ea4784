"""The package as built: version, lazy imports, one OpenMP runtime, safe instruction sets."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import flowprefill
import flowprefill.policies

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str) -> str:
    """Run `code` in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version_metadata_says_the_same() -> None:
    assert importlib.metadata.version("flowprefill") == flowprefill.__version__


def test_import_scheduling_loads_no_torch() -> None:
    heavy = {"torch", "numpy", "aiohttp", "flowprefill._core"}
    code = "import sys, flowprefill.config, flowprefill.scheduling; print(*sys.modules)"
    assert heavy.isdisjoint(run_python(code).split())


def test_public_names_all_resolve() -> None:
    names = [name for name in flowprefill.__all__ if name != "__version__"]
    missing = [name for name in names if getattr(flowprefill, name).__name__ != name]
    assert missing == []
    assert set(dir(flowprefill)) == set(flowprefill.__all__)


def test_public_name_unknown_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Enigne'"):
        _ = flowprefill.Enigne  # type: ignore[attr-defined]


def test_own_policy_needs_nothing_but_the_public_modules() -> None:
    source = (ROOT / "examples" / "4_own_policy.py").read_text()
    ours = {line.split()[1] for line in source.splitlines() if line.startswith("from flowprefill")}
    assert ours == {"flowprefill", "flowprefill.policies"}


def test_names_for_policies_load_no_torch() -> None:
    code = "import sys; from flowprefill.policies import *; print(BasePolicy, *sys.modules)"
    assert {"torch", "numpy", "flowprefill._core"}.isdisjoint(run_python(code).split())


def test_python_page_lists_every_public_name() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    public = [*flowprefill.__all__, *flowprefill.policies.__all__]
    assert [name for name in public if f"`{name}`" not in page and f"`{name}(" not in page] == []


def test_every_folder_with_modules_is_a_package() -> None:
    # setuptools leaves a folder without __init__.py out of the wheel, and nothing says so.
    folders = {path.parent for path in (ROOT / "flowprefill").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("order", ["torch, flowprefill._core", "flowprefill._core, torch"])
def test_process_has_one_openmp_runtime(order: str) -> None:
    code = f"import {order}; print(open('/proc/self/maps').read())"
    runtimes = set(re.findall(r"\S*lib[gi]?omp\d?[-.\w]*\.so\S*", run_python(code)))
    assert len(runtimes) == 1, runtimes


def test_native_module_needs_no_openmp_runtime() -> None:
    # Our threads are our own; a runtime that we called would count torch's threads with them.
    module = importlib.util.find_spec("flowprefill._core")
    assert module is not None
    assert module.origin is not None
    command = ["readelf", "--wide", "--dynamic", "--dyn-syms", module.origin]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in listing
    assert re.findall(r"\S*lib[gi]?omp\d?[-.\w]*\.so|GOMP_\w+|\bomp_\w+", listing) == []


def test_torch_version_is_the_same_everywhere() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pinned = next(r for r in requires if r.startswith("torch=="))
    for name in ("Makefile", "setup.py", "cmake/FindTorchWheel.cmake", "deploy/Dockerfile"):
        assert set(re.findall(r"torch==[\d.]+\d", (ROOT / name).read_text())) == {pinned}, name


def native_modules() -> list[Path]:
    return sorted((ROOT / "flowprefill").glob("_c*.so"))


def readelf(*arguments: str) -> str:
    return subprocess.run(
        ["readelf", "--wide", *arguments], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("module", native_modules(), ids=lambda path: path.name.split(".")[0])
def test_module_loads_libraries_from_full_paths_only(module: Path) -> None:
    # An empty element of the run path means the current folder: a user who can write there
    # would choose the libraries.
    for line in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", readelf("--dynamic", str(module))):
        assert all(part.startswith(("/", "$ORIGIN/")) for part in line.split(":")), line


@pytest.mark.parametrize("module", native_modules(), ids=lambda path: path.name.split(".")[0])
def test_module_is_hardened(module: Path) -> None:
    assert "BIND_NOW" in readelf("--dynamic", str(module))
    assert "GNU_RELRO" in readelf("--program-headers", str(module))
    assert "__stack_chk_fail" in readelf("--dyn-syms", str(module))


COMPILE_COMMANDS = ROOT / "build" / "cmake" / "compile_commands.json"


@pytest.mark.skipif(not COMPILE_COMMANDS.exists(), reason="no in-place build")
def test_every_cpp_file_is_compiled_with_fortified_functions() -> None:
    commands = [entry["command"] for entry in json.loads(COMPILE_COMMANDS.read_text())]
    assert [command for command in commands if "-D_FORTIFY_SOURCE=" not in command] == []


def isa_objects() -> list[Path]:
    """Objects compiled for more than the baseline, from the in-place build."""
    found = (ROOT / "build" / "cmake").rglob("*.isa.cc.o")
    return sorted(p for p in found if not any("baseline" in part for part in p.parts))


@pytest.mark.skipif(not isa_objects(), reason="no in-place build for several instruction sets")
def test_isa_objects_share_no_inline_code() -> None:
    # A weak symbol is merged with its namesakes: the linker might keep this copy, with instructions
    # that an older machine lacks, for callers all over the module. A name with the level in it is
    # safe: no other object has it.
    for path in isa_objects():
        listing = subprocess.run(
            ["nm", str(path)], capture_output=True, text=True, check=True
        ).stdout
        weak = [line.split()[-1] for line in listing.splitlines() if re.search(r" [WVu] ", line)]
        shared = [name for name in weak if not re.search(r"isa_avx\w", name)]
        assert shared == [], (
            f"{path.name}: keep templates and inline functions of others out of *.isa.cc"
        )
