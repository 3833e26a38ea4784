"""The kit of a bare GPU machine: what its bench of a model and its report write."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from kit import model_bench, report

from flowprefill.engine.device_choice import choose_device
from flowprefill.models.model_config import ModelConfig


def tiny(layers: int) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=515, hidden_size=128, intermediate_size=208, num_layers=layers,
        num_heads=4, num_kv_heads=2, head_dim=64, rms_eps=1e-5, rope_theta=1e4, max_position=2048,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_bench_of_a_model_fills_its_tables(
    tmp_path: Path, is_double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_bench, "llama_8b", tiny)
    monkeypatch.setattr(model_bench, "EAGER_TOKENS", (64,))
    monkeypatch.setattr(model_bench, "MEASURES_GEMMS", not is_double)
    path = tmp_path / "model.json"
    args = Namespace(json=path, budget_s=1e9, layers=1, tokens=[64], parts=list(model_bench.PARTS))
    model_bench.ModelBench(choose_device("cuda"), args).measure()
    found = json.loads(path.read_text())
    tables = [row["table"] for row in found["rows"]]
    assert set(tables) == {
        "load", "start", "rates", "prefill", "operators", "make_run", "run_ahead",
    }  # fmt: skip
    assert tables.count("start") == 4
    prefills = [row for row in found["rows"] if row["table"] == "prefill"]
    assert {(row["tokens"], row["launch"]) for row in prefills} == {
        (64, "graph"), (64, "eager"),
    }  # fmt: skip
    operators = next(row for row in found["rows"] if row["table"] == "operators")
    assert {"embed", "attention", "down_proj"} <= set(operators["ms"])
    assert found["graphs"]["num_failed"] == 0


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
