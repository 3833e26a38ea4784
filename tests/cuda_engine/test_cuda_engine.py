"""The whole engine with device cuda over doubles of CUDA: tokens, preemption, failures, memory."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from double_engine import (
    TOLERANCE,
    WAIT_S,
    KeptLogits,
    assert_all_free,
    greedy,
    ids_of,
    prompt_of,
    reference_logits,
    wait_for,
)

from flowprefill import SLO, ConfigError, Engine, EngineConfig, Request, RequestFailed, _core

OpenEngine = Callable[..., Engine]
pytestmark = pytest.mark.usefixtures("cuda")
LONG = 1500
ERROR_LAUNCH_FAILURE = 719


def start_long(engine: Engine, request: Request, slo: SLO | None = None) -> Any:
    """Submit a request and wait until the executor is in the middle of it."""
    segments = engine.stats().segments
    handle = engine.submit(request, slo)
    wait_for(lambda: engine.stats().segments > segments, "the long prefill executes")
    return handle


def set_options(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Have the models of this test made with these options, whatever the engine says."""
    make = cuda.Model
    monkeypatch.setattr(cuda, "Model", lambda config, given: make(config, given | options))


def test_the_module_tells_of_its_device(cuda: ModuleType) -> None:
    assert cuda.device_count() == 1
    assert cuda.availability() == (True, "double, compute capability 8.0")
    is_usable, reason = cuda.availability(1)
    assert not is_usable
    assert reason == "no GPU with this number: there is one, cuda:0"
    assert cuda.device_info()["compute_capability"] == (8, 0)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (35, r"the NVIDIA driver is too old: it supports CUDA \d+\.\d, this build needs \d+\.\d"),
        (100, r"the NVIDIA driver shows no GPU \(CUDA_VISIBLE_DEVICES is '7'\)"),
        (3, r"cudaGetDeviceCount: "),
    ],
)
def test_no_device_says_exactly_why(
    cuda: ModuleType,
    controls: ctypes.CDLL,
    open_engine: OpenEngine,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    words: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    controls.double_set_device_count_code(code)
    try:
        assert cuda.device_count() == 0
        with pytest.raises(ConfigError, match=words):
            open_engine(device="cuda")
        engine = open_engine(device="auto")
        assert engine.describe()["device"] == "cpu"
        assert re.match(words, engine.describe()["reason"])
    finally:
        controls.double_set_device_count_code(0)


def test_a_gpu_that_is_too_old_is_named(
    cuda: ModuleType, controls: ctypes.CDLL, open_engine: OpenEngine
) -> None:
    controls.double_set_compute_capability(75)
    try:
        with pytest.raises(
            ConfigError, match=r"double has compute capability 7\.5, 8\.0 or higher"
        ):
            open_engine(device="cuda")
        assert open_engine(device="auto").describe()["device"] == "cpu"
    finally:
        controls.double_set_compute_capability(80)


@pytest.mark.parametrize("granularity", ["operator", "layer", "none", "chunk:64", "budget:2"])
def test_greedy_tokens_and_logits_are_those_of_the_reference(
    open_engine: OpenEngine, checkpoint: Path, granularity: str
) -> None:
    engine = open_engine(device="cuda", granularity=granularity)
    assert engine.describe()["device"] == "cuda:0"
    kept = KeptLogits(engine)
    prompt = prompt_of(100)
    tokens = ids_of(engine, prompt, 6)
    expected = reference_logits(checkpoint, prompt + tokens)[99:105]
    scale = np.abs(expected).max()
    assert len(kept.rows) == 6
    assert np.abs(np.concatenate(kept.rows) - expected).max() < TOLERANCE * scale
    chosen = expected[np.arange(6), tokens]
    assert (chosen >= expected.max(axis=1) - TOLERANCE * scale).all()
    assert_all_free(engine)


def test_cpu_and_cuda_agree_within_bf16(open_engine: OpenEngine) -> None:
    prompt, kept = prompt_of(333, 3), {}
    for device in ("cpu", "cuda"):
        engine = open_engine(device=device, dtype="f32" if device == "cpu" else "auto")
        rows = KeptLogits(engine).rows
        ids_of(engine, prompt, 1)
        kept[device] = rows[0]
    difference = np.abs(kept["cpu"] - kept["cuda"]).max()
    assert 0 < difference < TOLERANCE * np.abs(kept["cpu"]).max()


def test_packed_prompts_and_decode_steps_do_not_disturb_each_other(open_engine: OpenEngine) -> None:
    engine = open_engine(device="cuda")
    prompts = [prompt_of(tokens, seed) for seed, tokens in enumerate((5, 64, 130, 17))]
    alone = [ids_of(engine, prompt, 5) for prompt in prompts]
    handles = [engine.submit(Request(prompt, greedy(5))) for prompt in prompts]
    assert [handle.result(WAIT_S).token_ids for handle in handles] == alone
    assert_all_free(engine)


@pytest.mark.parametrize("lanes", [1, 2])
def test_urgent_request_overtakes_and_both_are_right(
    open_engine: OpenEngine, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    set_options(cuda, monkeypatch, num_lanes=lanes)
    engine = open_engine(device="cuda", policy="edf")
    long_ids, short_ids = prompt_of(LONG, 1), prompt_of(30, 2)
    expected = ids_of(engine, long_ids, 3), ids_of(engine, short_ids, 1)
    long = start_long(engine, Request(long_ids, greedy(3)), SLO(ttft=60.0))
    short_done = engine.submit(Request(short_ids, greedy(1)), SLO(ttft=1.0)).result(WAIT_S)
    assert not long.done, "the short one ends first"
    long_done = long.result(WAIT_S)
    assert (long_done.token_ids, short_done.token_ids) == expected
    assert long_done.timings.preemptions >= 1
    report = engine._worker._model.lane_report()  # type: ignore[attr-defined]
    assert (report["num_spills"] > 0) == (lanes == 1), "one lane: its activations make room"
    assert report["num_restores"] == report["num_spills"]
    assert_all_free(engine)


def test_cancelled_in_mid_prefill_frees_everything(open_engine: OpenEngine) -> None:
    engine = open_engine(device="cuda")
    expected = ids_of(engine, prompt_of(40, 2), 3)
    long = start_long(engine, Request(prompt_of(LONG, 1), greedy(3)))
    long.cancel()
    wait_for(lambda: long.done, "the cancelled request ends")
    assert engine.stats().segments > 0
    assert ids_of(engine, prompt_of(40, 2), 3) == expected
    assert_all_free(engine)


def test_a_failing_segment_ends_one_request_and_names_the_operator(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(device="cuda")
    expected = ids_of(engine, prompt_of(40, 2), 3)
    model: Any = engine._worker._model

    class Failing:
        def make_run(self, *arguments: Any, **options: Any) -> Any:
            return model.make_run(*arguments, **options, fail_at=3)

    with monkeypatch.context() as patch:
        patch.setattr(engine._worker, "_model", Failing())
        failed = engine.submit(Request(prompt_of(50, 4), greedy(2), id="bad"))
        with pytest.raises(RequestFailed, match=r"request bad: .*operator '\w+'.*injected failure"):
            failed.result(WAIT_S)
    assert ids_of(engine, prompt_of(40, 2), 3) == expected
    assert_all_free(engine)


@pytest.mark.parametrize("call", [b"cudaLaunchKernel", b"cudaEventRecord", b"cudaMemcpyAsync"])
def test_a_cuda_call_that_fails_ends_one_request_only(
    open_engine: OpenEngine, controls: ctypes.CDLL, call: bytes
) -> None:
    engine = open_engine(device="cuda")
    expected = ids_of(engine, prompt_of(40, 2), 3)
    faults = controls.double_num_faults()
    controls.double_fail_call_of(call, 2, ERROR_LAUNCH_FAILURE)
    with pytest.raises(RequestFailed, match=r"\(719, double\)"):
        engine.submit(Request(prompt_of(LONG, 4), greedy(1))).result(WAIT_S)
    assert controls.double_num_faults() == faults + 1
    assert ids_of(engine, prompt_of(40, 2), 3) == expected, "the executor lives on"
    assert_all_free(engine)


@pytest.mark.parametrize("settings", [{}, {"max_model_len": 20, "max_batch_tokens": 8}])
def test_calibration_probes_run_on_the_device(
    open_engine: OpenEngine,
    cuda: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: dict[str, int],
) -> None:
    # Measuring matrix kernels takes minutes on the double; the C++ tests do it on small shapes.
    set_options(cuda, monkeypatch, measures_gemms=False)
    engine = open_engine(device="cuda", calibrate=True, granularity="budget:2", **settings)
    (kept,) = tmp_path.glob("rates-*.json")
    assert '"gpu": "double"' in kept.read_text()
    assert len(ids_of(engine, prompt_of(10), 3)) == 3
    assert_all_free(engine)


def test_decode_steps_replay_graphs(open_engine: OpenEngine) -> None:
    engine = open_engine(device="cuda", granularity="budget:2")
    ids_of(engine, prompt_of(20), 20)
    report = engine._worker._model.graph_report()  # type: ignore[attr-defined]
    assert report["num_failed"] == 0, report["last_failure"]
    assert report["num_replayed"] > 0


def test_the_second_start_captures_graphs_ahead(
    open_engine: OpenEngine, cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_options(cuda, monkeypatch, measures_gemms=False, warm_tokens=4)
    # By operators: embedding is worth a graph however slowly the double computes.
    first = open_engine(device="cuda", calibrate=True)
    expected = ids_of(first, prompt_of(20), 8)
    first.close()
    second = open_engine(device="cuda", calibrate=True)
    report = second._worker._model.graph_report()  # type: ignore[attr-defined]
    assert second.stats().segments == 0, "the rates are known: no probe has run"
    assert report["num_failed"] == 0, report["last_failure"]
    assert report["num_captured"] > 0
    assert ids_of(second, prompt_of(20), 8) == expected


def test_runs_stay_in_the_module_that_made_them(cuda: ModuleType) -> None:
    executor = _core.Executor(1)
    run: Any = cuda.spin_run(1, 1, 0.0)
    for action in (executor.dispatch, executor.cancel, executor.suspend, _core.logits):
        with pytest.raises(TypeError, match=r"run: got flowprefill\._cuda\.Run, expected flow"):
            action(run)
    with pytest.raises(TypeError, match=r"run: got flowprefill\._core\.Run, expected flow"):
        cuda.logits(_core.spin_run(1, 1, 0.0))
    with pytest.raises(TypeError, match=r"run: got builtins\.int, expected flow"):
        executor.dispatch(3)  # type: ignore[arg-type]


def test_a_closed_engine_leaves_nothing_on_the_device(
    checkpoint: Path, controls: ctypes.CDLL
) -> None:
    def serve() -> int:
        settings = EngineConfig(
            device="cuda", calibrate=False, kv_cache_gib=0.01, max_model_len=512
        )
        with Engine(checkpoint, settings) as engine:
            ids_of(engine, prompt_of(20), 2)
            return int(controls.double_live_handles())

    gc.collect()
    before = controls.double_live_handles()
    assert serve() > before
    gc.collect()
    assert controls.double_live_handles() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_lane": 1}, "num_lane: no such option of a CUDA model"),
        ({"run_ahead": 9}, "run_ahead: got 9, expected 1 to 4"),
        ({"buckets": "all"}, "buckets: got 'all'"),
        ({"max_tokens": 2**40}, "max_tokens: got"),
    ],
)
def test_bad_options_name_themselves(
    cuda: ModuleType, checkpoint: Path, options: dict[str, Any], words: str
) -> None:
    from flowprefill.models.checkpoint import open_checkpoint

    with pytest.raises(ValueError, match=words):
        cuda.Model(open_checkpoint(checkpoint).graph, options)
