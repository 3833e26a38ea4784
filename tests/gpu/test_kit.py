"""The kit of a bare GPU machine: what its report writes, and which packages it brings."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from kit import report

ROOT = Path(__file__).resolve().parents[2]
# What a machine with torch for GPUs and the usual libraries has; see docs/cuda-testing.md.
PRESENT = {
    "torch", "numpy", "aiohttp", "safetensors", "tokenizers", "jinja2", "prometheus_client", "rich",
    "transformers", "hypothesis", "pytest", "matplotlib", "yaml",
}  # fmt: skip

RESULTS = """<testsuites><testsuite>
  <testcase classname="Gemm" name="Adds"/>
  <testcase classname="Gemm" name="Fails"><failure message="no"/></testcase>
  <testcase classname="Gemm" name="Waits"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_written_for_a_card_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / "logs"
    (logs / "gpu_test").mkdir(parents=True)
    (tmp_path / "tests").write_text("Gemm.Adds\nGemm.Dies\n")
    (logs / "gpu_test" / "Gemm.Adds.xml").write_text(RESULTS)
    (tmp_path / "summary.tsv").write_text("3\ttests\tstatus 1 after 3 s\n")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), str(logs), "abc123"])
    (logs / "kernels.log").write_text("no GPU: no driver\n")
    report.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "summary.tsv", "tests"]
    (logs / "kernels.log").write_text("device\tNVIDIA H100 80GB\t132\n")
    report.main()
    found = json.loads((tmp_path / "nvidia-h100-80gb-abc123.json").read_text())
    of_cpp = found["tests"]["gpu_test"]
    assert (of_cpp["run"], of_cpp["skipped"], of_cpp["failed"]) == (2, 1, ["Gemm.Fails"])
    assert [line.partition(":")[0] for line in of_cpp["missing"]] == ["Gemm.Dies"]
    assert found["tests"]["pytest"]["missing"]
    assert found["stages"] == [["3", "tests", "status 1 after 3 s"]]
    assert found["goodput"] == {}


def test_a_report_of_goodput_alone_names_the_engines_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = {"settings": {"engine": {"device": "cuda:0", "gpu": "NVIDIA H200"}}, "rows": [1]}
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "goodput.json").write_text(json.dumps(bench))
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), str(logs), "abc"])
    report.main()
    assert json.loads((tmp_path / "nvidia-h200-abc.json").read_text())["goodput"] == bench


def test_a_report_names_the_commits_of_what_was_compiled_and_of_what_was_packed_later(
    tmp_path: Path,
) -> None:
    """Scripts packed anew leave what was compiled; a pack that fails leaves no commit."""
    folder = tmp_path / "tests/gpu/kit"
    shutil.copytree(ROOT / "tests/gpu/kit", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".gitignore").write_text(".gpu-kit/\nbuild/\n")
    named = tmp_path / ".gpu-kit/prebuilt/commit"

    def git(*words: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *own, "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit() -> str:
        git("add", "-A")
        git("commit", "-q", "-m", "a", "--allow-empty")
        return git("rev-parse", "--short=12", "HEAD")

    def pack(*words: str) -> int:
        command = ["env", "PYTHON=/bin/false", "bash", str(folder / "pack.sh"), *words]
        return subprocess.run(command, capture_output=True, check=False).returncode

    git("init", "-q")
    first = commit()
    named.parent.mkdir(parents=True)
    named.write_text(f"{first}\n")
    assert pack("--quick") == 0
    assert named.read_text() == f"{first}\n"
    (folder / "run.sh").write_text("# another\n")
    second = commit()
    for _ in range(2):
        assert pack("--quick") == 0
        assert named.read_text() == f"{first}+{second}\n"
    assert pack() != 0
    assert not named.exists()


def packed() -> set[str]:
    """The packages that pack.sh brings, as one imports them."""
    script = (ROOT / "tests/gpu/kit/pack.sh").read_text()
    (names,) = re.findall(r'download "\$kit/wheels" (.*)', script)
    return {name.partition("==")[0].replace("-", "_") for name in names.split()}


def test_what_the_package_depends_on_is_packed_or_present() -> None:
    """Else nothing of it can be imported there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=\[ ]", line)[0] for line in project["dependencies"]}
    assert needed <= PRESENT | packed()


def test_what_the_device_suite_imports_is_packed_or_present() -> None:
    """All of its files are imported when tests are collected, those without a test of GPUs too."""
    files = [*(ROOT / "tests/device").glob("*.py"), *(ROOT / "tests").glob("*.py")]
    own = {path.stem for path in files} | {"flowprefill"}
    found = set()
    for path in files:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    assert found - own - set(sys.stdlib_module_names) <= PRESENT | packed()
