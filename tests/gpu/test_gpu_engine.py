"""The whole engine on a GPU against the engine on the CPU; the bench of a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gpu_models import prompt_of

from flowprefill import SLO, Engine, EngineConfig, Request, SamplingParams
from flowprefill.cli import main

pytestmark = pytest.mark.gpu
WAIT_S = 120.0
CLOSE_CALL = 0.1  # logits so near each other may change places by rounding
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived",
)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"did not happen: {what}"
        time.sleep(0.001)


def assert_all_free(engine: Engine) -> None:
    wait_for(lambda: engine.stats().kv_blocks_used == 0, "every block is free")
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.suspended) == (0, 0, 0)


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


@pytest.fixture
def open_engine(tmp_path: Path) -> Any:
    """Make an engine with these settings; closed at the end."""
    engines: list[Engine] = []
    defaults: dict[str, Any] = {
        "calibrate": False, "kv_cache_gib": 0.05, "max_model_len": 2048,
        "cache_dir": str(tmp_path), "prefix_cache": False,
    }  # fmt: skip

    def open_one(model: str | Path, **settings: Any) -> Engine:
        engines.append(Engine(model, EngineConfig(**(defaults | settings))))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close(0.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_greedy_tokens_are_the_cpus_but_for_close_calls(open_engine: Any, is_double: bool) -> None:
    prompts = PROMPTS[:1] if is_double else PROMPTS
    count = 4 if is_double else 24
    on_cpu = open_engine("smollm2-135m", device="cpu")
    margins, want = Margins(on_cpu), []
    for prompt in prompts:
        margins.found.clear()
        completion = on_cpu.submit(Request(prompt, greedy(count))).result(WAIT_S)
        want.append((completion.token_ids, list(margins.found)))
        assert len(margins.found) == count
    on_cpu.close(0.0)
    on_gpu = open_engine("smollm2-135m", device="cuda")
    for prompt, (ids, margin) in zip(prompts, want, strict=True):
        got = on_gpu.submit(Request(prompt, greedy(count))).result(WAIT_S).token_ids
        differences = [i for i in range(count) if got[i] != ids[i]]
        if differences:  # what follows the first one answers another text
            assert margin[differences[0]] < CLOSE_CALL, f"{prompt!r}: {got} instead of {ids}"
    assert_all_free(on_gpu)


def start_long(engine: Engine, ids: list[int], slo: SLO) -> Any:
    """Submit a long prompt and wait until the executor is in the middle of it."""
    segments = engine.stats().segments
    handle = engine.submit(Request(ids, greedy(2)), slo)
    wait_for(lambda: engine.stats().segments > segments, "the long prefill executes")
    return handle


def test_urgent_requests_and_a_long_one_get_what_they_get_alone(
    open_engine: Any, checkpoint: Callable[[str], Path]
) -> None:
    engine = open_engine(checkpoint("llama"), device="cuda", granularity="operator", policy="edf")
    long_ids = prompt_of(1500, 1)
    shorts = [prompt_of(20 + number, number) for number in range(2, 7)]

    def alone(ids: list[int], count: int) -> list[int]:
        found: list[int] = engine.submit(Request(ids, greedy(count))).result(WAIT_S).token_ids
        return found

    long_alone, shorts_alone = alone(long_ids, 2), [alone(ids, 2) for ids in shorts]
    for _ in range(5):
        long = start_long(engine, long_ids, SLO(ttft=60.0))
        handles = [engine.submit(Request(ids, greedy(2)), SLO(ttft=1.0)) for ids in shorts]
        assert [handle.result(WAIT_S).token_ids for handle in handles] == shorts_alone
        assert long.result(WAIT_S).token_ids == long_alone
    assert_all_free(engine)


def test_cancelled_in_mid_prefill_frees_everything(
    open_engine: Any, checkpoint: Callable[[str], Path]
) -> None:
    engine = open_engine(checkpoint("llama"), device="cuda", granularity="operator")
    ids = prompt_of(40, 2)
    want = engine.submit(Request(ids, greedy(3))).result(WAIT_S).token_ids
    for _ in range(5):
        long = start_long(engine, prompt_of(1500, 1), SLO())
        long.cancel()
        wait_for(lambda handle=long: handle.done, "the cancelled request ends")  # type: ignore[misc]
        assert engine.submit(Request(ids, greedy(3))).result(WAIT_S).token_ids == want
    assert_all_free(engine)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_bench_fills_its_tables(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    is_double: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "gpu.json"
    # Measuring matrix kernels takes minutes on the double.
    tables = ["prefill", "run_ahead"] if is_double else ["gemm", "prefill", "run_ahead", "hol"]
    flags = ["--granularity", "operator", "--only", *tables, "--json", str(path)]
    assert main(["bench", "gpu", "--model", str(checkpoint("llama")), "--quick", *flags]) == 0
    report = json.loads(path.read_text())
    assert {row["table"] for row in report["rows"]} == set(tables)
    assert report["gpu"]["memory_bytes"] > 0
    assert report["graphs"]["num_failed"] == 0, report["graphs"]["last_failure"]
    depths = [row for row in report["rows"] if row["table"] == "run_ahead"]
    assert [row["run_ahead"] for row in depths] == [1, 2, 3, 4]
    assert all(row["segments"] > 0 for row in depths)
