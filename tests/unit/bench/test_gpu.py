"""`bench gpu` on a stand-in of the module for GPUs whose models are the CPU's: rows as stated."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fake_cuda
import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_models import SERVED, save_with_tokenizer, tiny_model

from flowprefill.bench import gpu_peer, gpu_shape, gpu_torch
from flowprefill.bench.gpu_model import Segment, gaps_of
from flowprefill.bench.random_model import tiny
from flowprefill.cli import main


class Model(fake_cuda.Model):
    """One with the reports of a GPU's, whose weights others share."""

    sharing: ClassVar[list[dict[str, Any]]] = []  # options of those with another's weights

    def sharing_weights(self, options: dict[str, Any]) -> Model:
        other = object.__new__(Model)
        other.inner = self.inner
        Model.sharing.append(options)
        return other

    def make_run(self, *args: Any, fetch_logits: bool = True, **options: Any) -> Any:
        return self.inner.make_run(*args, **options)

    def load_blocks(self, name: str, rows: npt.NDArray[np.uint8]) -> None:
        codes = torch.from_numpy(rows[:, :-4].copy()).view(torch.float8_e4m3fn).float()
        self.inner.load(name, codes.numpy() * rows[:, -4:].copy().view(np.float32))

    def lane_bytes(self, block_tokens: int) -> int:
        return 1000

    def graph_report(self) -> dict[str, Any]:
        return {"num_executables": 3, "bytes": 4096, "capture_s": 0.5}

    def gemm_report(self) -> list[tuple[int, int, int, str, str, dict[str, float | str]]]:
        timings: dict[str, float | str] = {"a": 10.0, "b": 8.0, "cublaslt": "too old"}
        return [
            (128, 64, 64, "bf16 gated", "b", timings),
            (256, 64, 64, "float", "", {"a": "failed"}),
        ]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[bool, str]]:
    """What the stand-in says of its GPUs; changed by a test."""
    found = [fake_cuda.USABLE]
    fake_cuda.install(monkeypatch, found, model=Model)
    monkeypatch.setattr(Model, "sharing", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the default model's tokenizer."""
    shape = SERVED | {"max_position_embeddings": 4096, "tie_word_embeddings": True}
    path = tmp_path_factory.mktemp("gpu-bench") / "tiny"
    save_with_tokenizer(tiny_model("llama", **shape), path)
    return path


def rows_of(report: dict[str, Any], table: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["table"] == table]


@pytest.mark.slow
def test_every_table_is_in_the_report(
    folder: Path, tmp_path: Path, gpus: list[tuple[bool, str]]
) -> None:
    path = tmp_path / "report.json"
    flags = ["--tokens", "40", "1500", "--granularity", "operator", "--shorts", "3"]
    command = ["bench", "gpu", "--model", str(folder), "--quick", *flags, "--json", str(path)]
    assert main(command) == 0
    report = json.loads(path.read_text())
    assert {"machine", "commit", "command", "rows", "settings"} <= report.keys()
    assert report["gpu"]["name"] == "Test GPU"
    assert report["gpu"]["compute_capability"] == "9.0"
    assert report["graphs"]["bytes"] == 4096
    assert report["memory"]["weight_bytes"] > 0
    prefill = [(row["launch"], row["tokens"], row["samples"]) for row in rows_of(report, "prefill")]
    assert prefill == [(how, n, 3) for how in ("graph", "eager") for n in (40, 1500)]
    assert [row["run_ahead"] for row in rows_of(report, "run_ahead")] == [1, 2, 3, 4]
    for row in rows_of(report, "run_ahead"):
        assert row["segments"] > 10
        assert row["gap_p50_s"] <= row["gap_p99_s"]
        assert 0 <= row["gap_share"] < 1
    assert [row["granularity"] for row in rows_of(report, "hol")] == [
        "none",
        "operator",
        "budget:2",
    ]
    assert len(Model.made) == 2, "loaded for the tables, and by the engine"
    depths = [options.get("run_ahead") for options in Model.sharing]
    assert depths == [1, None, 1, 2, 3, 4], "usual, eager, by depth"
    assert Model.sharing[1]["has_graphs"] is False
    assert len({options.get("gemm_cache_path") for options in Model.sharing}) == 1
    fast, failed = rows_of(report, "gemm")
    assert (fast["chosen"], fast["us"], fast["others"]) == ("b", 8.0, "a 10.0, cublaslt: too old")
    assert fast["tflops_per_s"] == pytest.approx(2 * 128 * 64 * 64 / 8e-6 / 1e12)
    assert failed["us"] is None
    assert report["peak_gemm_flops_per_s"] == pytest.approx(fast["tflops_per_s"] * 1e12)


def test_only_the_tables_asked_for_are_measured(
    folder: Path, tmp_path: Path, gpus: list[tuple[bool, str]]
) -> None:
    path = tmp_path / "report.json"
    command = ["bench", "gpu", "--model", str(folder), "--quick", "--only", "prefill"]
    assert main([*command, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {row["table"] for row in report["rows"]} == {"prefill"}
    assert [options["measures_gemms"] for options in Model.sharing] == [False, False]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda:x"], "device: got 'cuda:x'"),
        (["--device", "cpu"], "device: got 'cpu', expected a GPU"),
        (["--tokens", "0"], "tokens: got 0"),
        (["--tokens", "5000"], "tokens: got 5000, expected at most 4096"),
        (["--only", "speed"], "speed"),
        (["--shape", "tiny", "--tokens", "5000"], "tokens: got 5000, expected at most 2048"),
        (["--shape", "tiny", "--limit-s", "0"], "limit-s: got 0"),
        (["--shape", "tiny", "--peer-s", "0"], "peer-s: got 0"),
        (
            ["--shape", "tiny", "--tokens", "64", "--quantization", "fp8"],
            "quantization: got 'fp8', expected --weights",
        ),
    ],
)
def test_bad_flags_are_named(
    flags: list[str],
    message: str,
    folder: Path,
    gpus: list[tuple[bool, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["bench", "gpu", "--model", str(folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_there_is_one_line_that_says_what_is_missing(
    gpus: list[tuple[bool, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    gpus.clear()
    assert main(["bench", "gpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "device: got 'cuda', but no NVIDIA driver" in line
    assert not Model.made


def test_a_model_that_no_kernel_takes_is_named(
    folder: Path,
    gpus: list[tuple[bool, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.modules["flowprefill._cuda"], "Model", fake_cuda.RefusingModel)
    assert main(["bench", "gpu", "--model", str(folder), "--quick"]) == 1
    assert "cuda:0: head_dim: got 16, expected 64, 96 or 128" in capsys.readouterr().err


@pytest.mark.slow
def test_a_shape_is_measured_in_bf16_and_in_fp8(
    tmp_path: Path, gpus: list[tuple[bool, str]]
) -> None:
    path, picture = tmp_path / "report.json", tmp_path / "report.svg"
    flags = ["--shape", "tiny", "--layers", "1", "--tokens", "64", "--limit-s", "1e9"]
    flags += ["--weights", "bf16", "fp8", "--parts", "prefill", "decode", "operators", "torch"]
    flags += ["--json", str(path), "--picture", str(picture)]
    assert main(["bench", "gpu", *flags]) == 0
    report = json.loads(path.read_text())
    of_bf16, of_fp8 = ([row["table"] for row in report["rows"] if row["weights"] == name]
                       for name in ("bf16", "fp8"))  # fmt: skip
    assert of_bf16 == of_fp8
    assert {"prefill", "decode", "operators", "torch"} <= set(of_fp8)
    decodes = [(row["batch"], row["granularity"]) for row in rows_of(report, "decode")]
    assert decodes == 2 * [(n, cut) for n in (1, 16, 64) for cut in ("budget:0.5", "none")]
    assert [len(options["fp8_sources"]) for options in Model.made] == [0, 7], "q k v o gate up down"
    assert {"memory", "memory_fp8", "graphs", "graphs_fp8"} <= report.keys()
    assert "<svg" in picture.read_text()


def test_fp8_is_refused_where_the_gpu_does_not_multiply_it(
    gpus: list[tuple[bool, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Model, "capability", (8, 0))
    flags = ["--shape", "tiny", "--tokens", "64", "--weights", "bf16", "fp8"]
    assert main(["bench", "gpu", *flags]) == 2
    message = "quantization: got 'fp8', expected 'auto' or 'none' on cuda:0: its compute capability"
    assert f"{message} is 8.0, FP8 is multiplied from 8.9 on" in capsys.readouterr().err
    assert not Model.made, "said before anything is loaded"


@pytest.mark.slow
def test_the_peer_is_measured_in_turns_with_ours(
    tmp_path: Path, gpus: list[tuple[bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = torch.device("cpu")
    monkeypatch.setattr(gpu_shape.ShapeBench, "_torch_device", lambda bench: here)
    monkeypatch.setattr(gpu_shape, "BATCHES", (1, 4))
    monkeypatch.setattr(gpu_shape, "CONTEXT", 64)
    monkeypatch.setattr(gpu_peer, "STEPS", 2)
    monkeypatch.setattr(gpu_peer, "COMPILED_TOKENS", (520,))
    works_of, unknown = gpu_peer.works_of, gpu_peer.Work("no such attention", "prefill", 16)
    monkeypatch.setattr(gpu_peer, "works_of", lambda *found: [unknown, *works_of(*found)])
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # it would take a minute
    path, picture = tmp_path / "report.json", tmp_path / "report.svg"
    flags = ["--shape", "tiny", "--layers", "1", "--tokens", "64", "520", "--limit-s", "1e9"]
    flags += ["--peer", "transformers", "--peer-s", "1e9", "--parts", "transformers"]
    assert main(["bench", "gpu", *flags, "--json", str(path), "--picture", str(picture)]) == 0
    report = json.loads(path.read_text())
    failed, *rows = rows_of(report, "transformers")
    assert "ValueError: " in failed["failure"], "and the next is measured"
    assert [(row["how"], row["kind"], row["tokens"], row["sequences"]) for row in rows] == [
        ("sdpa", "prefill", 520, 1),
        ("sdpa", "decode", 63, 1),
        ("sdpa", "decode", 63, 4),
        ("sdpa, torch.compile", "decode", 63, 1),
        ("sdpa, torch.compile", "prefill", 520, 1),
    ]
    for row in rows:
        assert row["peer"].startswith("transformers 5."), row
        assert row["min"] <= row["tokens_per_s"] <= row["max"]
        factor = row["flowprefill_tokens_per_s"] / row["tokens_per_s"]
        assert row["flowprefill_faster"] == pytest.approx(factor)
    assert report["settings"]["peer_s"] == 1e9
    assert picture.read_text().count("transformers") == 2, "in prefill and in decode"


def test_what_torch_lacks_is_told_beside_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def us_of(call: Callable[[], torch.Tensor], rounds: int = 7) -> float:
        call()
        return 10.0

    monkeypatch.setattr(gpu_torch, "us_of", us_of)
    here = torch.device("cpu")
    (row,) = gpu_torch.product_rows(here, {"o_proj": (24, 16)}, [8])
    assert row["operator"] == "o_proj"
    assert row["tflops_per_s"] == pytest.approx(2 * 8 * 24 * 16 / 10e-6 / 1e12)
    cudnn, flash = gpu_torch.attention_rows(here, tiny(1), [32])
    assert "failure" in cudnn, "a library of GPUs"
    pairs = 32 * 33 / 2
    assert flash["tflops_per_s"] == pytest.approx(4 * 4 * 64 * pairs / 10e-6 / 1e12)


def test_torch_multiplies_e4m3_with_a_scale_for_each_row_and_column(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scaled_mm(
        x: torch.Tensor, y: torch.Tensor, of_x: torch.Tensor, of_y: torch.Tensor, out_dtype: Any
    ) -> torch.Tensor:
        assert (x.dtype, y.dtype, out_dtype) == (*2 * (torch.float8_e4m3fn,), torch.bfloat16)
        assert (x.is_contiguous(), y.t().is_contiguous()) == (True, True), "as the kernels want it"
        assert (of_x.shape, of_y.shape) == ((8, 1), (1, 32))
        out = (x.float() * of_x) @ (y.float() * of_y)
        assert 0 < out.abs().max() < torch.inf
        return out.to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(gpu_torch, "us_of", lambda call: call() is None or 10.0)
    here, products = torch.device("cpu"), {"o_proj": (32, 16), "down_proj": (32, 48)}
    rows = list(gpu_torch.product_rows(here, products, [8], "fp8"))
    assert [(row["operator"], row["weights"]) for row in rows] == [
        ("o_proj", "fp8"),
        ("down_proj", "fp8"),
    ]
    assert rows[1]["tflops_per_s"] == pytest.approx(2 * 8 * 32 * 48 / 10e-6 / 1e12)
    monkeypatch.delattr(torch, "_scaled_mm")
    (row,) = gpu_torch.product_rows(here, products, [8, 16], "fp8")
    assert "_scaled_mm" in row["failure"], "said once"


def test_gaps_are_those_within_a_run() -> None:
    segments = [
        Segment(1, 0, 0.0, 1.0), Segment(1, 1, 1.5, 2.0), Segment(2, 0, 9.0, 9.5),
        Segment(2, 1, 9.25, 10.0),
    ]  # fmt: skip
    assert gaps_of(segments) == [0.5, 0.0]
