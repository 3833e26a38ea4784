"""The whole engine on a GPU against the engine on the CPU; the bench of a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cases import Saved
from devices import GPUS, Device, on
from engines import assert_all_free, greedy

from flowprefill import Engine, Request
from flowprefill.bench import gpu_cost, gpu_shape
from flowprefill.bench.goodput.engine_backend import EngineBackend
from flowprefill.bench.goodput.setting import Setting
from flowprefill.bench.random_model import RandomCheckpoint, tiny
from flowprefill.cli import main
from flowprefill.traces import TraceRequest

WAIT_S = 120.0
# Errors of two devices' logits that may make them change places: one logit's standard deviations,
# of which a difference of two has 1.4.
CLOSE_CALL = 4.5
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived",
)


class Observed:
    """An engine that chooses its tokens on the host, which keeps what it chose from."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._found: list[npt.NDArray[np.float32]] = []
        worker: Any = engine._worker
        self._logits = worker.logits
        worker.logits = self._keep
        worker.limits = replace(worker.limits, chooses_tokens=False)

    def _keep(self, run: Any) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = self._logits(run)
        self._found.append(logits[0].copy())
        return logits

    def generate(self, prompt: str, count: int) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Return the tokens and the logits before each of them, [count, vocabulary]."""
        self._found.clear()
        completion = self._engine.submit(Request(prompt, greedy(count))).result(WAIT_S)
        assert len(self._found) == count
        return completion.token_ids, np.array(self._found)


@pytest.mark.slow
@pytest.mark.timeout(600)
@on(GPUS)
def test_greedy_tokens_are_the_cpus_but_for_close_calls(device: Device, open_engine: Any) -> None:
    """How close a call may be follows from how far apart the logits of the devices are.

    With random weights in 30 layers the same rounding makes a larger part of them.
    """
    prompts = PROMPTS[:1] if device.is_double else PROMPTS
    count = 4 if device.is_double else 24
    on_cpu = open_engine("smollm2-135m", device="cpu")
    observed = Observed(on_cpu)
    want = [observed.generate(prompt, count) for prompt in prompts]
    on_cpu.close(0.0)
    on_gpu = open_engine("smollm2-135m")
    chosen = [on_gpu.submit(Request(p, greedy(count))).result(WAIT_S).token_ids for p in prompts]
    observed = Observed(on_gpu)
    for prompt, got, (ids, logits) in zip(prompts, chosen, want, strict=True):
        errors = observed.generate(prompt, 1)[1][0] - logits[0]
        assert errors.std() < 2 * device.tolerance * logits[0].std()
        differences = [i for i in range(count) if got[i] != ids[i]]
        if differences:  # what follows the first one answers another text
            first = differences[0]
            behind = logits[first].max() - logits[first, got[first]]
            assert behind < CLOSE_CALL * errors.std(), f"{prompt!r}: {got} instead of {ids}"
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


@pytest.mark.slow
@pytest.mark.timeout(600)
@on(GPUS)
def test_the_bench_of_a_shape_fills_its_tables(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_shape, "SHORTS", 4)
    path, picture = tmp_path / "gpu.json", tmp_path / "gpu.svg"
    flags = ["--shape", "tiny", "--layers", "1", "--tokens", "64", "520", "--limit-s", "1e9"]
    assert main(["bench", "gpu", *flags, "--json", str(path), "--picture", str(picture)]) == 0
    found = json.loads(path.read_text())
    rows = found["rows"]
    tables = {row["table"] for row in rows}
    assert tables == {
        "load", "start", "rates", "prefill", "blocking", "cost", "hol", "decode", "operators",
        "operator_times", "torch", "make_run",
    }  # fmt: skip
    prefills = {
        (row["tokens"], row["launch"], row["granularity"])
        for row in rows
        if row["table"] == "prefill"
    }
    usual = gpu_shape.USUAL
    assert {(n, how, usual) for n in (64, 520) for how in ("graph", "eager")} <= prefills
    assert {(n, "graph", "operator") for n in (64, 520)} <= prefills
    blocking = [row for row in rows if row["table"] == "blocking"]
    assert [(row["run_ahead"], row["launches_late"], row["granularity"]) for row in blocking] == [
        *((1, True, name) for name in gpu_shape.GRANULARITIES),
        (1, False, usual),
        (2, False, usual),
    ]
    assert all(row["segments"] > 0 and row["of_none"] > 0 for row in blocking)
    costs = [row for row in rows if row["table"] == "cost"]
    assert [row["granularity"] for row in costs] == list(gpu_cost.GRANULARITIES)
    assert all(row["tokens"] == 520 and row["of_none"] > 0 for row in costs)
    assert all(
        sum(kind["segments"] for kind in row["operators"].values()) == row["segments"]
        for row in costs
    )
    decodes = [row for row in rows if row["table"] == "decode"]
    assert [(row["batch"], row["granularity"]) for row in decodes] == [
        (batch, name) for batch in gpu_shape.BATCHES for name in (usual, "none")
    ]
    assert all(row["segments"] > 0 and row["busy_s"] > 0 for row in decodes)
    operators = {row["operator"] for row in rows if row["table"] == "operators"}
    assert {"qkv_proj", "attention", "o_proj", "gate_up_proj", "down_proj"} == operators
    assert found["graphs"]["num_failed"] == 0, found["graphs"]["last_failure"]
    assert found["memory"]["weight_bytes"] > 0
    assert "<svg" in picture.read_text()


@on(GPUS)
def test_the_bench_of_a_shape_measures_waiting_behind_the_longest_prompt(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_shape, "LONG", 256)
    monkeypatch.setattr(gpu_shape, "SHORTS", 4)
    path = tmp_path / "gpu.json"
    flags = ["--shape", "tiny", "--layers", "1", "--tokens", "64", "520", "--limit-s", "1e9"]
    parts = ["--parts", "long_blocking", "--json", str(path)]
    assert main(["bench", "gpu", *flags, *parts]) == 0
    rows = [row for row in json.loads(path.read_text())["rows"] if row["table"] == "long_blocking"]
    assert [(row["granularity"], row["long_tokens"]) for row in rows] == [(gpu_shape.USUAL, 520)]
    assert rows[0]["segment_max_s"] > 0


@on(GPUS)
def test_the_bench_of_goodput_keeps_one_engine_of_random_weights(device: Device) -> None:
    settings = {**device.settings, "calibrate": False, "max_model_len": 512}
    del settings["granularity"]
    backend = EngineBackend(RandomCheckpoint("tiny", tiny(1)), keeps_engine=True, **settings)
    assert backend.description["device"].startswith("cuda")
    requests = [TraceRequest(0.002 * n, 20 + 30 * (n % 3), 1, "a", ttft_s=60.0) for n in range(9)]
    for text in ("fcfs+none", "slack_edf+chunk:32", "s_edf_paper+operator", "slack_edf+budget:0.5"):
        measured = backend.measure(Setting.parse(text), requests, 1, is_detailed=True)
        assert (measured.attainment, measured.failed) == (1.0, 0)
        assert measured.stretches or device.is_double  # whose clock is its own
    backend.close()


@on(GPUS)
def test_the_bench_of_a_shape_ends_in_time(device: Device, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    flags = ["--shape", "tiny", "--layers", "1", "--tokens", "64", "--limit-s", "1"]
    assert main(["bench", "gpu", *flags, "--json", str(path)]) == 0
    tables = [row["table"] for row in json.loads(path.read_text())["rows"]]
    assert tables == ["load", "start", "rates"], "no part was begun"
