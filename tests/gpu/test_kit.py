"""The kit of a bare GPU machine: what its report writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from kit import report

RESULTS = """<testsuites><testsuite>
  <testcase classname="Gemm" name="Adds"/>
  <testcase classname="Gemm" name="Fails"><failure message="no"/></testcase>
  <testcase classname="Gemm" name="Waits"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_written_for_a_card_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "gpu_test.xml").write_text(RESULTS)
    (tmp_path / "summary.tsv").write_text("3\ttests\tstatus 1 after 3 s\n")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), str(logs), "abc123"])
    (tmp_path / "kernel_bench.tsv").write_text("no GPU: no driver\n")
    report.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "kernel_bench.tsv",
        "logs",
        "summary.tsv",
    ]
    (tmp_path / "kernel_bench.tsv").write_text("device\tNVIDIA H100 80GB\t132\n")
    report.main()
    found = json.loads((tmp_path / "nvidia-h100-80gb-abc123.json").read_text())
    assert found["tests"]["gpu_test"] == {"run": 2, "skipped": 1, "failed": ["Gemm.Fails"]}
    assert "missing" in found["tests"]["pytest"]
    assert found["stages"] == [["3", "tests", "status 1 after 3 s"]]
