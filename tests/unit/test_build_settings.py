"""Whether flowprefill._cuda is built: FLOWPREFILL_CUDA, and what a build that lacks parts says."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py; it builds nothing."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [(None, "AUTO"), ("", "AUTO"), ("auto", "AUTO"), ("1", "ON"), ("ON", "ON"), ("0", "OFF")],
)
def test_environment_decides_about_the_module(
    setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, asked: str | None, wanted: str
) -> None:
    monkeypatch.delenv("FLOWPREFILL_CUDA_ARCHITECTURES", raising=False)
    monkeypatch.delenv("FLOWPREFILL_CUDA", raising=False)
    if asked is not None:
        monkeypatch.setenv("FLOWPREFILL_CUDA", asked)
    settings = setup_script["cuda_settings"]()
    assert settings["FP_CUDA"] == wanted
    assert settings["FP_CUDA_ARCHITECTURES"] in (ROOT / "cmake/CudaToolkit.cmake").read_text()


def test_architectures_are_a_list_for_cmake(
    setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWPREFILL_CUDA_ARCHITECTURES", "80-real, 90-real")
    assert setup_script["cuda_settings"]()["FP_CUDA_ARCHITECTURES"] == "80-real;90-real"


def test_another_word_stops_the_build(
    setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWPREFILL_CUDA", "yes please")
    with pytest.raises(SystemExit, match="FLOWPREFILL_CUDA: got 'yes please', expected 1, 0 or"):
        setup_script["cuda_settings"]()


def test_a_tool_that_is_missing_is_named_with_its_version(
    setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    for name, wanted in (("cmake", "cmake>=3.26"), ("ninja", "ninja")):
        with pytest.raises(SystemExit, match=f"needs {name} to build: pip install '{wanted}'"):
            setup_script["find_tool"](name)


@pytest.mark.parametrize("project", [".", "tests/gpu/cpp"])
def test_cmake_files_that_compile_cuda_want_the_version_that_pip_installs(
    setup_script: dict[str, Any], project: str
) -> None:
    (wanted,) = (r for r in setup_script["build_requirements"]() if r.startswith("cmake"))
    oldest = wanted.removeprefix("cmake>=")
    assert tuple(map(int, oldest.split("."))) >= (3, 26), "the first that knows C++20 of nvcc"
    text = (ROOT / project / "CMakeLists.txt").read_text()
    assert f"cmake_minimum_required(VERSION {oldest}..." in text


def configure(folder: Path, *settings: str, **environment: str) -> tuple[int, str]:
    """Configure a build as setup.py does; returns the status and what it said, on one line."""
    command = [
        shutil.which("cmake", path=f"{BIN}:{os.environ['PATH']}") or "cmake",
        "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}", *settings,
    ]  # fmt: skip
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.slow
def test_demanded_module_names_everything_that_is_missing(tmp_path: Path) -> None:
    empty = tmp_path / "no-toolkit"
    status, said = configure(
        tmp_path / "build",
        "-DFP_CUDA=ON", f"-DCUTLASS_INCLUDE_DIR={tmp_path}", CUDA_HOME=str(empty), PATH="/usr/bin",
    )  # fmt: skip
    assert status != 0
    assert "FLOWPREFILL_CUDA=1 (FP_CUDA=ON) asks for the CUDA module. Missing:" in said
    assert f"a CUDA toolkit (bin/nvcc, include/cuda_runtime_api.h, lib64/libcudart_static.a): none in {empty}" in said  # fmt: skip  # noqa: E501
    assert "the headers of CUTLASS: pip install --no-deps nvidia-cutlass==" in said


@pytest.mark.slow
def test_a_build_without_the_module_needs_nothing_of_cuda(tmp_path: Path) -> None:
    status, said = configure(
        tmp_path / "build", "-DFP_CUDA=OFF", CUDA_HOME=str(tmp_path), PATH="/usr/bin"
    )
    assert (status, "_cuda: not built (FP_CUDA=OFF)" in said) == (0, True), said
    cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
    assert "FP_CUDA_ENABLED:INTERNAL=OFF" in cache
    assert "CMAKE_CUDA_COMPILER" not in cache


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("FP_CUDA=MAYBE", "FP_CUDA: got 'MAYBE', expected AUTO, ON or OFF"),
        ("FP_CUDA_ARCHITECTURES=75", "FP_CUDA_ARCHITECTURES: got '75', expected native, or a list"),
    ],
)
def test_a_bad_setting_names_itself(tmp_path: Path, setting: str, words: str) -> None:
    status, said = configure(tmp_path / "build", f"-D{setting}")
    assert status != 0
    assert words in said


def test_description_of_the_package_leads_to_no_file_of_the_repository(
    setup_script: dict[str, Any],
) -> None:
    text, readme = setup_script["description"](), (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    headings = re.findall(r"^#+ .*$", readme, re.MULTILINE)
    assert re.findall(r"^#+ .*$", text, re.MULTILINE) == headings
    assert "](docs/" in readme  # else the rule above would say nothing
    assert "docs/scheduling.md" in text
    assert re.findall(r":\n\n#", text) == []  # no colon before a picture that is left out
