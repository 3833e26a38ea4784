"""The whole engine on a GPU against the engine on the CPU; the bench of a GPU."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cases import Saved
from devices import GPUS, Device, on
from engines import assert_all_free, greedy
from gpu.kit import model_bench

from flowprefill import Engine, Request
from flowprefill.cli import main
from flowprefill.engine.device_choice import choose_device
from flowprefill.models.model_config import ModelConfig

WAIT_S = 120.0
CLOSE_CALL = 0.1  # logits so near each other may change places by rounding
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived",
)


class Margins:
    """Keeps, of every run of a CPU engine, how far the best logit is before the second."""

    def __init__(self, engine: Engine) -> None:
        self.found: list[float] = []
        worker: Any = engine._worker
        self._outcomes = worker.outcomes
        worker.outcomes = self._keep

    def _keep(self, run: Any) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = self._outcomes(run)
        second, best = np.partition(logits[0], -2)[-2:]
        self.found.append(float(best - second))
        return logits


@pytest.mark.slow
@pytest.mark.timeout(600)
@on(GPUS)
def test_greedy_tokens_are_the_cpus_but_for_close_calls(device: Device, open_engine: Any) -> None:
    prompts = PROMPTS[:1] if device.is_double else PROMPTS
    count = 4 if device.is_double else 24
    on_cpu = open_engine("smollm2-135m", device="cpu")
    margins, want = Margins(on_cpu), []
    for prompt in prompts:
        margins.found.clear()
        completion = on_cpu.submit(Request(prompt, greedy(count))).result(WAIT_S)
        want.append((completion.token_ids, list(margins.found)))
        assert len(margins.found) == count
    on_cpu.close(0.0)
    on_gpu = open_engine("smollm2-135m")
    for prompt, (ids, margin) in zip(prompts, want, strict=True):
        got = on_gpu.submit(Request(prompt, greedy(count))).result(WAIT_S).token_ids
        differences = [i for i in range(count) if got[i] != ids[i]]
        if differences:  # what follows the first one answers another text
            assert margin[differences[0]] < CLOSE_CALL, f"{prompt!r}: {got} instead of {ids}"
    assert_all_free(on_gpu)


@pytest.mark.slow
@pytest.mark.timeout(600)
@on(GPUS)
def test_the_bench_fills_its_tables(
    device: Device,
    saved: Callable[[Device, str], Saved],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "gpu.json"
    # Measuring matrix kernels takes minutes on the double.
    tables = (
        ["prefill", "run_ahead"] if device.is_double else ["gemm", "prefill", "run_ahead", "hol"]
    )
    flags = ["--granularity", "operator", "--only", *tables, "--json", str(path)]
    assert (
        main(
            [
                "bench",
                "gpu",
                "--model",
                str(saved(device, "llama-grouped").folder),
                "--quick",
                *flags,
            ]
        )
        == 0
    )
    report = json.loads(path.read_text())
    assert {row["table"] for row in report["rows"]} == set(tables)
    assert report["gpu"]["memory_bytes"] > 0
    assert report["graphs"]["num_failed"] == 0, report["graphs"]["last_failure"]
    depths = [row for row in report["rows"] if row["table"] == "run_ahead"]
    assert [row["run_ahead"] for row in depths] == [1, 2, 3, 4]
    assert all(row["segments"] > 0 for row in depths)


def tiny(layers: int) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=515, hidden_size=128, intermediate_size=208, num_layers=layers,
        num_heads=4, num_kv_heads=2, head_dim=64, rms_eps=1e-5, rope_theta=1e4, max_position=2048,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@on(GPUS)
def test_the_bench_of_a_model_fills_its_tables(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_bench, "llama_8b", tiny)
    monkeypatch.setattr(model_bench, "EAGER_TOKENS", (64,))
    monkeypatch.setattr(model_bench, "MEASURES_GEMMS", not device.is_double)
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
