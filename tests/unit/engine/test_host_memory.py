"""Memory for a model's weights: what there is, what they take, and the error where it is less."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from address_space import memory_limited

from flowprefill import ConfigError, Engine, EngineConfig, _core
from flowprefill.engine import cpu_device
from flowprefill.engine.cpu_device import CpuDevice
from flowprefill.engine.device_choice import open_model
from flowprefill.engine.host_memory import Room, available, weight_bytes
from flowprefill.models.checkpoint import Checkpoint, open_checkpoint

MIB = 1 << 20
PLENTY = Room(1 << 50, "none")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("smollm2-135m")


def config(**settings: object) -> EngineConfig:
    fields = {"device": "cpu", "dtype": "f32", "threads": 1, "quantization": "none"} | settings
    return EngineConfig.from_mapping(fields)


def meminfo(root: Path, text: str) -> Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(text)
    return root


def test_what_is_available_is_the_least_of_the_bounds(tmp_path: Path) -> None:
    lines = "MemTotal: 8192 kB\nMemAvailable: 1024 kB\nSwapTotal: 512 kB\nSwapFree: 256 kB\nX: 1\n"
    most, free = available(meminfo(tmp_path, lines))
    assert (most.bytes, free.bytes) == (8704 << 10, 1280 << 10)
    with memory_limited(64 * MIB):
        most, free = available()
    assert (most.bytes, most.bound) == (pytest.approx(64 * MIB, abs=16 * MIB), "ulimit -v")
    assert free.bytes <= most.bytes


def test_without_proc_nothing_is_refused(tmp_path: Path) -> None:
    assert available(tmp_path)[0].bytes > 1 << 50


@pytest.mark.parametrize("quantization", ["none", "int8", "gguf"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_weights_take_what_was_predicted(
    checkpoint: Checkpoint, dtype: str, quantization: str
) -> None:
    if (dtype == "bf16" and not _core.has_bf16_gemm()) or (
        quantization == "int8" and not _core.has_int8_gemm()
    ):
        pytest.skip("this processor does not multiply it")
    device = CpuDevice(config(dtype=dtype, quantization=quantization), "")
    numbers = "int8" if quantization == "int8" else "none"
    predicted = weight_bytes(checkpoint.graph, dtype, numbers, device.block_formats(checkpoint))
    assert device.make_model(checkpoint).weight_bytes == pytest.approx(predicted, rel=0.02)


def test_weights_larger_than_the_machine_are_refused_with_what_may_be_changed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(100 * MIB, "all of this machine")
    monkeypatch.setattr(cpu_device, "available", lambda: (room, room))
    monkeypatch.setattr(_core, "has_bf16_gemm", lambda: True)
    words = (
        r"memory: the weights take 0\.61 GiB, .* 0\.10 GiB are available \(all of this machine\), "
        r"expected settings that take less \(0\.09 with quantization 'gguf', 0\.30 with dtype 'bf1"
    )
    with pytest.raises(ConfigError, match=words):
        open_model(config(), checkpoint)


def test_of_memory_that_others_use_there_is_a_warning_only(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = Room(100 * MIB, "of this machine, at the moment")
    monkeypatch.setattr(cpu_device, "available", lambda: (PLENTY, free))
    with caplog.at_level(logging.WARNING):
        CpuDevice(config(), "").make_model(checkpoint)
    assert "the weights take 0.61 GiB" in caplog.text
    assert "0.10 GiB are available (of this machine, at the moment)" in caplog.text


# A process of its own: what others have given back would do for this one.
CHILD = """
import sys
from address_space import memory_limited
from flowprefill import ConfigError, EngineConfig
from flowprefill.engine import cpu_device, device_choice, host_memory
from flowprefill.models.checkpoint import open_checkpoint

checkpoint = open_checkpoint("smollm2-135m")
config = EngineConfig(device="cpu", dtype="f32", threads=1, quantization="none")
cpu_device.available = lambda: (host_memory.Room(1 << 50, "none"),) * 2
try:
    with memory_limited(int(sys.argv[1])):
        device_choice.open_model(config, checkpoint)
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize("more", [200 * MIB, 670 * MIB])
def test_memory_that_runs_out_is_the_same_error(more: int) -> None:
    """In the middle of taking the weights' memory, or of reading them."""
    command = [sys.executable, "-c", CHILD, str(more)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=True, env=environment
    )
    assert done.stdout.startswith("memory: the weights take 0.61 GiB"), done


def test_threads_that_the_system_does_not_start_are_named(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_device, "available", lambda: (PLENTY, PLENTY))
    device = CpuDevice(config(threads=1024), "")
    words = r"threads: the system does not start 1024 of them \(.*\), expected fewer"
    with memory_limited(256 * MIB), pytest.raises(ConfigError, match=words):
        device.make_model(checkpoint)
    with memory_limited(256 * MIB), pytest.raises(ConfigError, match=words):
        device.start_executor(None, None)  # type: ignore[arg-type] - it looks at no model


def test_an_engine_without_an_event_thread_is_the_same_error_and_leaves_no_thread(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        if thread.name == "fp-events":
            raise RuntimeError("can't start new thread")
        really(thread)

    def executors() -> int:
        return sum(
            path.read_text() == "fp-executor\n" for path in Path("/proc/self/task").glob("*/comm")
        )

    before, really = executors(), threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(ConfigError, match=r"threads: the system does not start one more \(can't"):
        open_engine()
    assert executors() == before


def test_a_cache_of_too_many_blocks_is_refused_by_its_bounds(
    open_engine: Callable[..., Engine],
) -> None:
    for gib, words in (
        (65_536.0, r"got 65536\.0, expected at most \d+ \(2147483647 x 16 tokens\)"),
        (1e-7, r"got 1e-07, expected at least \S+e-0\d \(1 x 16 tokens\)"),
    ):
        with pytest.raises(ConfigError, match=rf"kv_cache_gib: {words}") as caught:
            open_engine(kv_cache_gib=gib, block_tokens=16)
        assert caught.value.param == "kv_cache_gib"
