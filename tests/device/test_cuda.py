"""What only CUDA has: devices that are missing or too old, CUDA's failures, graphs, options."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from cases import Saved
from conftest import Tiny
from devices import DOUBLE, GPUS, Device, double_module, on
from engines import WAIT_S, assert_all_free, greedy, ids_of, prompt_of

from flowprefill import ConfigError, Engine, Request, RequestFailed, _core
from flowprefill.models.checkpoint import open_checkpoint
from flowprefill.scheduling.cost_model import MachineRates

OpenEngine = Callable[..., Engine]
ERROR_LAUNCH_FAILURE = 719
DOUBLES = ("cuda-double",)
# With what an uncalibrated engine assumes, a decode step may seem to take so long that launching it
# kernel by kernel costs nothing.
FAST = MachineRates(1e15, 1e15, 1e15, 1e-4)


@pytest.fixture
def cuda(device: Device) -> ModuleType:
    """The device's module."""
    module: ModuleType = device.module
    return module


@pytest.fixture
def controls() -> ctypes.CDLL:
    """What tests ask of the double of the runtime: see double_controls.cc."""
    double_module()
    library = ctypes.CDLL(DOUBLE)
    library.double_fail_call_of.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
    library.double_num_faults.restype = ctypes.c_size_t
    return library


@on(DOUBLES)
def test_the_module_tells_of_its_device(cuda: ModuleType) -> None:
    assert cuda.device_count() == 1
    assert cuda.availability() == (True, "double, compute capability 8.0")
    is_usable, reason = cuda.availability(1)
    assert not is_usable
    assert reason == "no GPU with this number: there is one, cuda:0"
    assert cuda.device_info()["compute_capability"] == (8, 0)


@on(DOUBLES)
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


@on(DOUBLES)
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


@on(DOUBLES)
@pytest.mark.parametrize("call", [b"cudaLaunchKernel", b"cudaEventRecord", b"cudaMemcpyAsync"])
def test_a_cuda_call_that_fails_ends_one_request_only(
    open_engine: OpenEngine, controls: ctypes.CDLL, call: bytes
) -> None:
    engine = open_engine(device="cuda")
    expected = ids_of(engine, prompt_of(40, 2), 3)
    faults = controls.double_num_faults()
    controls.double_fail_call_of(call, 2, ERROR_LAUNCH_FAILURE)
    with pytest.raises(RequestFailed, match=r"\(719, double\)"):
        engine.submit(Request(prompt_of(1500, 4), greedy(1))).result(WAIT_S)
    assert controls.double_num_faults() == faults + 1
    assert ids_of(engine, prompt_of(40, 2), 3) == expected, "the executor lives on"
    assert_all_free(engine)


@on(GPUS)
def test_decode_steps_replay_graphs(open_engine: OpenEngine) -> None:
    engine = open_engine(device="cuda", granularity="budget:2")
    worker: Any = engine._worker
    worker.rates = FAST
    ids_of(engine, prompt_of(20), 20)
    report = worker._model.graph_report()
    assert report["num_failed"] == 0, report["last_failure"]
    assert report["num_replayed"] >= 18, "of 19 steps the first is eager"


@on(DOUBLES)
def test_a_decode_step_of_more_than_64_sequences_is_one_graph(open_engine: OpenEngine) -> None:
    engine = open_engine(device="cuda", granularity="budget:1000")
    worker: Any = engine._worker
    worker.rates = FAST
    prompts = [prompt_of(1, seed) for seed in range(70)]  # packed: at most 64 in a prefill
    alone = [ids_of(engine, prompt, 12) for prompt in prompts[:6]]
    seen, before = worker._executor.timeline().next, worker._model.graph_report()
    handles = [engine.submit(Request(prompt, greedy(12))) for prompt in prompts]
    together = [handle.result(WAIT_S).token_ids for handle in handles]
    assert together[:6] == alone
    records = worker._executor.timeline(seen).records
    steps = [record.run_id for record in records if record.label.row_end > 64]
    assert len(steps) >= 3
    assert all(sum(record.run_id == step for record in records) == 1 for step in steps)
    report = worker._model.graph_report()
    assert report["num_replayed"] - before["num_replayed"] >= len(steps) - 1, "the first is eager"
    assert_all_free(engine)


@on(DOUBLES)
def test_the_second_start_captures_graphs_ahead(
    open_engine: OpenEngine, set_options: Callable[..., None]
) -> None:
    set_options(measures_gemms=False, warm_tokens=4)
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


@on(DOUBLES)
def test_the_environment_chooses_the_attention_kernel(
    open_engine: OpenEngine, controls: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = controls.double_num_launches
    launches.restype = ctypes.c_size_t
    expected = ids_of(open_engine(device="cuda"), prompt_of(300), 2)
    before = launches(b"attention_hopper")
    monkeypatch.setenv("FLOWPREFILL_CUDA_ATTENTION", "fast")
    with pytest.raises(ConfigError, match="attention: got 'fast', expected portable, hopper or"):
        open_engine(device="cuda")
    monkeypatch.setenv("FLOWPREFILL_CUDA_ATTENTION", "hopper")
    with pytest.raises(ConfigError, match=r"capability 9\.0 \(this is 8\.0\)"):
        open_engine(device="cuda")
    monkeypatch.setenv("FLOWPREFILL_CUDA_ATTENTION", "auto")
    assert ids_of(open_engine(device="cuda"), prompt_of(300), 2) == expected
    assert launches(b"attention_hopper") == before, "neither may use it on 8.0"
    controls.double_set_compute_capability(90)
    try:
        assert ids_of(open_engine(device="cuda"), prompt_of(300), 2) == expected
    finally:
        controls.double_set_compute_capability(80)
    assert launches(b"attention_hopper") > before


@on(GPUS)
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


@on(DOUBLES)
def test_a_closed_engine_leaves_nothing_on_the_device(
    device: Device, tiny: Tiny, controls: ctypes.CDLL
) -> None:
    def serve() -> int:
        with device.open_engine(tiny[0], max_model_len=512) as engine:
            ids_of(engine, prompt_of(20), 2)
            return int(controls.double_live_handles())

    gc.collect()
    before = controls.double_live_handles()
    assert serve() > before
    gc.collect()
    assert controls.double_live_handles() == before


@on(GPUS)
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
    device: Device,
    saved: Callable[[Device, str], Saved],
    options: dict[str, Any],
    words: str,
) -> None:
    graph = open_checkpoint(saved(device, "llama-grouped").folder).graph
    with pytest.raises(ValueError, match=words):
        device.module.Model(graph, options)
