"""suite.py itself: the reasons for which it skips, on drivers made up; needs no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import suite

# A driver with these answers, by the names and numbers of its interface.
DRIVER = """
int cuInit(unsigned flags) {{ return {init}; }}
int cuDeviceGetCount(int *count) {{ *count = {count}; return 0; }}
int cuDeviceGet(int *device, int index) {{ *device = index; return 0; }}
int cuDeviceGetAttribute(int *value, int attribute, int device) {{
  *value = attribute == 75 ? {major} : attribute == 76 ? 5 : -1;
  return 0;
}}
"""


def driver(folder: Path, init: int = 0, count: int = 1, major: int = 9) -> str:
    source, library = folder / "driver.c", folder / "libdriver.so"
    source.write_text(DRIVER.format(init=init, count=count, major=major))
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


def test_a_driver_that_is_missing_is_named() -> None:
    assert suite.missing_gpu("libnone.so.7") == "no NVIDIA driver: libnone.so.7 cannot be loaded"


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({}, ""),
        ({"init": 100}, "the NVIDIA driver sees no GPU"),
        ({"count": 0}, "the NVIDIA driver sees no GPU"),
        ({"init": 999}, "the NVIDIA driver cannot be used: error 999 of its cuInit"),
        ({"major": 7, "count": 2}, "compute capability 7.5, 7.5, 8.0 or higher is needed"),
    ],
)
def test_what_the_driver_says_decides(tmp_path: Path, answers: dict[str, int], reason: str) -> None:
    assert suite.missing_gpu(driver(tmp_path, **answers)) == reason


def test_without_a_gpu_one_line_says_why_and_nothing_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "missing_gpu", lambda: "there is none")
    monkeypatch.setattr(suite, "run_steps", lambda: pytest.fail("built"))
    assert suite.main() == 0
    assert capsys.readouterr().out == "test-gpu: skipped: there is none\n"


def test_failed_tests_let_others_run_and_a_failed_build_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = suite.steps()

    def exiting(*statuses: int) -> list[suite.Step]:
        pairs = zip(steps, statuses, strict=True)
        return [step._replace(command=["sh", "-c", f"exit {code}"]) for step, code in pairs]

    for statuses, said in [
        ((0, 0, 0, 0, 1, 0), "failed: C++ tests\n"),
        ((0, 0, 0, 0, 1, 1), "failed: C++ tests, Python tests\n"),
        ((0, 0, 0, 1, 1, 1), "failed: build of the C++ tests\n"),
        ((0, 1, 1, 1, 1, 1), "failed: build of _cuda\n"),
    ]:
        monkeypatch.setattr(suite, "steps", lambda statuses=statuses: exiting(*statuses))
        assert suite.run_steps() == 1
        assert capsys.readouterr().err == f"test-gpu: {said}"
    monkeypatch.setattr(suite, "steps", lambda: exiting(0, 0, 0, 0, 0, 0))
    assert suite.run_steps() == 0
