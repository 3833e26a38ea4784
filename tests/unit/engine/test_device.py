"""The choice of a device: what is chosen, what is said about it, and the engine on it."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from engines import ids_of, prompt_of

from flowprefill import ConfigError, Engine, EngineConfig, _core
from flowprefill.engine import device_choice
from flowprefill.engine.device_choice import choose_device
from flowprefill.scheduling.cost_model import RunShape

TOO_OLD = (False, "Old GPU has compute capability 7.5, 8.0 or higher is needed")


def test_cpu_is_the_cpu_even_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, [fake_cuda.USABLE])
    choice = choose_device("cpu")
    assert (choice.name, choice.module) == ("cpu", None)
    assert "'cpu'" in choice.reason


@pytest.mark.parametrize(
    ("gpus", "setting", "name"),
    [
        ([fake_cuda.USABLE], "auto", "cuda:0"),
        ([TOO_OLD, fake_cuda.USABLE], "auto", "cuda:1"),
        ([TOO_OLD, fake_cuda.USABLE], "cuda", "cuda:1"),
        ([fake_cuda.USABLE, fake_cuda.USABLE], "cuda:1", "cuda:1"),
    ],
)
def test_a_usable_gpu_is_chosen(
    monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[bool, str]], setting: str, name: str
) -> None:
    fake_cuda.install(monkeypatch, gpus)
    choice = choose_device(setting)
    assert (choice.name, choice.index) == (name, int(name[-1]))
    assert choice.module is sys.modules["flowprefill._cuda"]
    assert choice.reason == fake_cuda.USABLE[1]


@pytest.mark.parametrize(
    ("gpus", "setting", "words"),
    [
        ([], "cuda", "no NVIDIA driver: libcuda.so.1"),
        ([], "cuda:0", "no NVIDIA driver"),
        ([fake_cuda.USABLE], "cuda:1", "no GPU with this number: there are 1"),
        ([TOO_OLD], "cuda", "compute capability 7.5"),
        ([TOO_OLD, fake_cuda.USABLE], "cuda:0", "compute capability 7.5"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_an_error_that_says_why(
    monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[bool, str]], setting: str, words: str
) -> None:
    fake_cuda.install(monkeypatch, gpus)
    with pytest.raises(ConfigError, match=words) as caught:
        choose_device(setting)
    assert caught.value.param == "device"
    assert f"got {setting!r}" in caught.value.message


def test_without_the_module_the_error_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.remove(monkeypatch)
    with pytest.raises(ConfigError, match=r"no module for GPUs; .*FLOWPREFILL_CUDA=1"):
        choose_device("cuda")


def test_a_module_that_does_not_load_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = importlib.import_module("flowprefill")
    monkeypatch.delitem(sys.modules, "flowprefill._cuda", raising=False)
    monkeypatch.setattr(package, "__path__", [str(tmp_path)])
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_cuda{suffix}").write_bytes(b"\x7fELF of another time")
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*_cuda"):
        choose_device("cuda")


def test_float32_is_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, [fake_cuda.USABLE])
    assert choose_device("auto", "f32").name == "cpu"
    assert choose_device("auto", "bf16").name == "cuda:0"
    with pytest.raises(ConfigError, match=r"dtype: got 'f32', .*bf16 only") as caught:
        Engine(config=EngineConfig(device="cuda", dtype="f32"))
    assert caught.value.param == "dtype"


@pytest.mark.parametrize("quantization", ["int8", "gguf"])
def test_quantised_weights_are_for_the_cpu(
    quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cuda.install(monkeypatch, [fake_cuda.USABLE])
    choice = choose_device("auto", quantization=quantization)
    assert (choice.name, choice.reason[:21]) == ("cpu", f"quantization is '{quantization}")
    with pytest.raises(
        ConfigError,
        match=rf"quantization: got '{quantization}', expected .*or 'fp8' on cuda:0",
    ) as caught:
        Engine(config=EngineConfig(device="cuda", quantization=quantization))
    assert caught.value.param == "quantization"


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_fp8_is_for_gpus(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, [fake_cuda.USABLE])
    assert choose_device("auto", quantization="fp8").name == "cuda:0"
    fake_cuda.install(monkeypatch, [])
    with pytest.raises(
        ConfigError, match=r"quantization: got 'fp8', expected .*'int8' or 'gguf' on the CPU \("
    ) as caught:
        Engine(config=EngineConfig(device=device, quantization="fp8"))
    assert caught.value.param == "quantization"


def test_int8_is_refused_where_the_processor_does_not_multiply_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_core, "has_int8_gemm", lambda: False)
    with pytest.raises(ConfigError, match=r"quantization: got 'int8', but this processor"):
        Engine(config=EngineConfig(device="cpu", quantization="int8"))


# ---- the engine


def log_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "flowprefill.engine.device_choice"]


@pytest.mark.parametrize("is_built", [True, False])
def test_auto_falls_to_the_cpu_with_one_line_in_the_log(
    open_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_built: bool,
) -> None:
    caplog.set_level(logging.INFO)
    if is_built:
        fake_cuda.install(monkeypatch, [])
    else:
        fake_cuda.remove(monkeypatch)
    engine = open_engine(device="auto", dtype="auto")
    missing = "no NVIDIA driver" if is_built else "no module for GPUs"
    (line,) = log_lines(caplog)
    assert line.startswith("device cpu: ")
    assert missing in line
    assert engine.describe()["device"] == "cpu"
    assert missing in engine.describe()["reason"]


def test_auto_falls_to_the_cpu_where_no_kernel_takes_the_model(
    open_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    fake_cuda.install(monkeypatch, [fake_cuda.USABLE], model=fake_cuda.RefusingModel)
    engine = open_engine(device="auto", dtype="auto")
    assert log_lines(caplog) == ["device cpu: cuda:0: head_dim: got 16, expected 64, 96 or 128"]
    assert engine.describe()["device"] == "cpu"
    with pytest.raises(ConfigError, match="cuda:0: head_dim: got 16"):
        open_engine(device="cuda", dtype="auto")


def test_an_engine_on_a_gpu_uses_its_module_and_tells_so(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ids_of(open_engine(device="cpu"), prompt_of(40), 5)
    fake_cuda.install(monkeypatch, [fake_cuda.USABLE, fake_cuda.USABLE])
    engine = open_engine(device="cuda:1", dtype="auto", max_model_len=500, kv_cache_gib=0.0)
    assert ids_of(engine, prompt_of(40), 5) == wanted
    about = engine.describe()
    assert (about["device"], about["dtype"], about["gpu"]) == ("cuda:1", "bf16", "Test GPU")
    assert about["reason"] == fake_cuda.USABLE[1]
    (options,) = fake_cuda.Model.made
    assert options["device"] == 1
    assert (options["max_tokens"], options["max_sequences"]) == (512, 256)
    assert not options["measures_gemms"], "calibration is switched off"


def test_the_cache_takes_a_share_of_what_is_free(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = fake_cuda.GIB  # 2 are for lanes, 1 for graphs
    fake_cuda.install(monkeypatch, [fake_cuda.USABLE], free_bytes=3 * gib + gib // 8)
    engine = open_engine(device="cuda", dtype="auto", max_model_len=500, kv_cache_gib=0.0)
    total = engine.stats().kv_blocks_total * engine._worker._model.bytes_per_block(64)
    assert 0.89 * gib / 8 < total <= 0.9 * gib / 8
    engine = open_engine(device="cuda", dtype="auto", max_model_len=500, kv_cache_gib=0.01)
    total = engine.stats().kv_blocks_total * engine._worker._model.bytes_per_block(64)
    assert 0.009 * gib < total <= 0.01 * gib, "the setting wins"
    fake_cuda.install(monkeypatch, [fake_cuda.USABLE], free_bytes=2 * gib)
    with pytest.raises(ConfigError, match=r"no memory .* is left on cuda:0"):
        open_engine(device="cuda", dtype="auto", kv_cache_gib=0.0)


def test_longest_prompt_on_a_gpu_is_bounded_unless_asked_for(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowprefill.engine.cuda_device.CudaDevice.max_model_len", 4096)
    fake_cuda.install(monkeypatch, [fake_cuda.USABLE])
    assert open_engine(device="cuda", dtype="auto").max_model_len == 4096
    longest = open_engine(device="cuda", dtype="auto", max_model_len=16_384)
    assert longest.max_model_len == 16_384
    assert [made["max_tokens"] for made in fake_cuda.Model.made] == [4096, 16_384]
    assert open_engine(device="cpu").max_model_len == 16_384


def test_calibration_is_kept_for_each_gpu(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_cuda.install(monkeypatch, [fake_cuda.USABLE])
    settings = {"calibrate": True, "cache_dir": str(tmp_path), "dtype": "auto"}
    first = open_engine(device="cuda", **settings)
    open_engine(device="cpu", **settings)
    assert len(list(tmp_path.glob("rates-*.json"))) == 2, "not the processor's rates"
    assert open_engine(device="cuda", **settings).rates == first.rates
    options = fake_cuda.Model.made[0]
    assert options["measures_gemms"]
    assert options["run_ahead"] == 1
    assert options["gemm_cache_path"] == str(tmp_path / "gemm-choices")


def test_kernel_choices_that_cannot_be_kept_are_told(
    open_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Model(fake_cuda.Model):
        gemm_cache_failure = "cache of GEMM choices kept: Is a directory"

    fake_cuda.install(monkeypatch, [fake_cuda.USABLE], model=Model)
    open_engine(device="cuda", dtype="auto")
    told = f"every start measures the kernels of products again: {Model.gemm_cache_failure}"
    assert f"cuda:0: {told}" in [record.getMessage() for record in caplog.records]


def test_a_gpu_that_has_become_slower_gets_shorter_segments(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    class Model(fake_cuda.Model):
        def make_run(self, *arguments: Any, **options: Any) -> Any:
            rates.append(arguments[2].rates.gemm_flops_per_s)
            return super().make_run(*arguments, **options)

    fake_cuda.install(monkeypatch, [fake_cuda.USABLE], model=Model)
    engine = open_engine(device="cuda", dtype="auto")
    cost_model = engine._core._scheduler.cost_model
    for _ in range(20):
        shape = RunShape(1_000, 500_500, 1)
        true_s = 3.0 * cost_model.nominal_s(shape)
        cost_model.observe("prefill", cost_model.packed_prefill_s(*shape), true_s, shape)
    ids_of(engine, prompt_of(40), 1)
    assert rates[0] < engine.rates.gemm_flops_per_s / 2


def test_memory_of_the_machine_that_runs_out_while_a_gpu_is_filled_is_an_error_of_ours(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise MemoryError

    fake_cuda.install(monkeypatch, [fake_cuda.USABLE])
    monkeypatch.setattr(device_choice, "fill_model", fill)
    with pytest.raises(ConfigError, match=r"memory: reading the weights takes .* are available"):
        open_engine(device="cuda", dtype="auto", max_model_len=500)
