"""Calibration: rates from measured times, kept on disk by machine, model and settings."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from flowprefill import Engine, Request, SamplingParams, _core
from flowprefill.config import EngineConfig, Granularity
from flowprefill.engine import calibration
from flowprefill.engine.calibration import RatesFile
from flowprefill.engine.cpu_device import CpuDevice
from flowprefill.engine.cuda_device import CudaDevice
from flowprefill.engine.device import ProbeSizes
from flowprefill.engine.loading import plan_options, undisturbed
from flowprefill.scheduling import MachineRates, ModelShape
from flowprefill.scheduling.cost_model import attention_pairs
from flowprefill.scheduling.operator_rates import NONE, Corrections, OperatorTime

RATES = MachineRates(1e11, 5e10, 1e10, 1e-3)
OTHER = MachineRates(2e11, 5e10, 1e10, 1e-3)
RATES_TEXT = (
    '{"rates": {"gemm_flops_per_s": 1e11, "attention_flops_per_s": 5e10, '
    '"weight_bytes_per_s": 1e10, "step_overhead_s": %s}}'
)


def test_rates_are_kept_by_their_key(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert RatesFile(folder, {"model": "a"}).read() is None
    RatesFile(folder, {"model": "a"}).write(RATES)
    assert RatesFile(folder, {"model": "a"}).read() == RATES
    assert RatesFile(folder, {"model": "b"}).read() is None
    RatesFile(folder, {"model": "b"}).write(OTHER)
    assert RatesFile(folder, {"model": "a"}).read() == RATES
    assert len(list(folder.iterdir())) == 2, "no half-written file stays"


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", '{"rates": {}}', '{"rates": {"gemm_flops_per_s": -1}}',
        '{"rates": 3}',
        RATES_TEXT % '"fast"', RATES_TEXT % "1e999", RATES_TEXT % ("9" * 400), RATES_TEXT % "[]",
        "[" * 100_000,
    ],
    ids=range(12),
)  # fmt: skip
def test_a_damaged_file_is_none_and_is_replaced(tmp_path: Path, content: str) -> None:
    file = RatesFile(tmp_path, {})
    file.write(RATES)
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    assert file.read() is None
    file.write(OTHER)
    assert json.loads(path.read_text())["rates"]["gemm_flops_per_s"] == 2e11


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    RatesFile(blocked / "under", {}).write(RATES)
    assert "calibration is not kept" in caplog.text


def test_a_file_that_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert RatesFile(blocked, {}).read() is None
    assert "kept calibration cannot be read, measuring again" in caplog.text


def test_two_writers_of_one_process_number_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As two containers that share a folder: each is process 1 of its own.
    monkeypatch.setattr(calibration.os, "getpid", lambda: 1)
    written: list[Path] = []
    original = Path.write_text

    def write_text(path: Path, text: str) -> int:
        written.append(path)
        return original(path, text)

    monkeypatch.setattr(Path, "write_text", write_text)
    for rates in (RATES, OTHER):
        RatesFile(tmp_path, {}).write(rates)
    assert len(set(written)) == 2
    assert RatesFile(tmp_path, {}).read() == OTHER
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, text: str) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    RatesFile(tmp_path, {}).write(RATES)
    assert "calibration is not kept: [Errno 28]" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_folder_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert calibration.cache_folder(EngineConfig()) is None
    file = RatesFile(calibration.cache_folder(EngineConfig()), {})
    file.write(RATES)
    assert file.read() is None
    assert "set cache_dir or XDG_CACHE_HOME" in caplog.text


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration.default_cache_dir() == tmp_path / "flowprefill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert calibration.default_cache_dir() == tmp_path / "home" / ".cache" / "flowprefill"


def test_a_failing_probe_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    executor = _core.Executor(1)
    executor.start()
    with pytest.raises(RuntimeError, match=r"calibration: run 1: .*injected failure"):
        calibration.execute(executor, _core.spin_run(1, 3, 0.0, fail_at=1))
    assert calibration.execute(executor, _core.spin_run(2, 3, 1e-4)) >= 3e-4
    executor.stop()


class Machine:
    """Probes that take as long as on a machine of RATES; `asked` are their sizes."""

    def __init__(self) -> None:
        self.shape = ModelShape(1e6, 2e7, 1e2, 1e6, 1e4)
        self.asked: list[tuple[int, int]] = []

    def make_probe(self, tokens: int, context: int) -> Any:
        self.asked.append((tokens, context))
        linear_s = max(tokens * 1e6 / RATES.gemm_flops_per_s, 2e7 / RATES.weight_bytes_per_s)
        pairs = attention_pairs(tokens, context)
        return linear_s + pairs * 1e2 / RATES.attention_flops_per_s

    def measure(self, sizes: ProbeSizes, max_context: int) -> MachineRates:
        no_executor: Any = None
        return calibration.measure(no_executor, self.make_probe, self.shape, max_context, sizes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose probes are not executed: they are the seconds they would take."""
    monkeypatch.setattr(calibration, "execute", lambda executor, seconds: seconds)
    return Machine()


@pytest.mark.parametrize("fills_context", [False, True])
def test_probes_have_the_devices_sizes_and_tell_its_rates(
    machine: Machine, fills_context: bool
) -> None:
    rates = machine.measure(ProbeSizes(500, 1300, fills_context), 10_000)
    assert rates.weight_bytes_per_s == pytest.approx(1e10, rel=0.1)
    assert rates.gemm_flops_per_s == pytest.approx(1e11, rel=0.1)
    assert rates.attention_flops_per_s == pytest.approx(5e10, rel=0.1)
    fills = [(500, 0), (500, 500), (300, 1000)] if fills_context else []
    rounds = calibration.ROUNDS
    linear = [(500, 0)] + rounds * [(1, 0)] + rounds * [(500, 0)]
    assert machine.asked == [*linear, *fills, *rounds * [(500, 0), (500, 1300)]]


def test_attention_is_never_faster_than_products(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([1.0, 0.1, 0.1, 0.1, 1.0, 1.0, 1.0, 1.2, 1.25, 1.2, 1.25, 1.2, 1.25])
    monkeypatch.setattr(calibration, "execute", lambda executor, probe: next(times))
    rates = machine.measure(ProbeSizes(500, 1300), 10_000)
    assert rates.attention_flops_per_s == rates.gemm_flops_per_s


@pytest.mark.parametrize(("kept", "is_busy"), [(1.0, False), (0.4, True), (2.0, False)])
def test_kept_rates_far_below_what_is_measured_are_of_a_busy_machine(
    machine: Machine, kept: float, is_busy: bool
) -> None:
    executor: Any = None
    rates = dataclasses.replace(RATES, gemm_flops_per_s=kept * RATES.gemm_flops_per_s)
    told = calibration.were_measured_busy(
        executor, machine.make_probe, machine.shape, 10_000, rates
    )
    assert told == is_busy
    assert set(machine.asked) == {(128, 0)}


@pytest.mark.parametrize(
    ("max_context", "longest", "with_context"),
    [(10_000, 400, (400, 1200)), (1000, 400, (400, 600)), (600, 400, (300, 300)), (450, 400, None)],
)
def test_probes_keep_to_what_the_cache_holds(
    machine: Machine, max_context: int, longest: int, with_context: tuple[int, int] | None
) -> None:
    machine.measure(ProbeSizes(400, 1200), max_context)
    assert max(tokens for tokens, _ in machine.asked) == longest
    assert max(sum(size) for size in machine.asked) <= max_context
    assert {size for size in machine.asked if size[1] > 0} == ({with_context} - {None})


def test_a_gpu_is_measured_with_more_than_a_processor() -> None:
    assert CpuDevice.probe_sizes == ProbeSizes(256, 3072)
    gpu = CudaDevice.probe_sizes
    assert gpu.tokens >= 2048
    assert gpu.context >= 8192
    assert gpu.fills_context


def test_probes_compute_noise_and_the_same_each_time() -> None:
    class Model:
        def __init__(self) -> None:
            self.rows: list[npt.NDArray[np.int32]] = []

        def make_run(self, run_id: int, batch: Any, plan: Any) -> None:
            self.rows.append(batch)

    native: Any = SimpleNamespace(
        Batch=lambda rows, sequences: rows,
        BatchSequence=dict,
        PlanOptions=dict,
        MachineRates=dict,
    )

    models: list[Any] = [Model(), Model()]
    for model in models:
        make_probe = calibration.probes_of(native, model, 8, 1000)
        make_probe(200, 0)
        make_probe(200, 64)
    first, second = models[0].rows
    assert first.dtype == np.int32
    assert 0 <= first.min() < first.max() < 1000
    assert len(set(first.tolist())) > 100
    assert (first != second).any()
    for mine, others in zip(models[0].rows, models[1].rows, strict=True):
        assert (mine == others).all()


def test_only_a_device_of_our_own_is_planned_slower_than_calibrated() -> None:
    assert CudaDevice.is_exclusive
    assert not CpuDevice.is_exclusive
    faster = Corrections(0.5, 0.6, 0.5, 1.2)
    for is_exclusive in (True, False):
        assert undisturbed(NONE, is_exclusive) == NONE
        assert undisturbed(faster, is_exclusive) == faster, "longer segments"
    slower = Corrections(2.0, 2.0, 3.0, 2.5)
    assert undisturbed(slower, is_exclusive=True) == slower
    alike = undisturbed(slower, is_exclusive=False)
    assert alike == Corrections(1.0, 1.0, 1.5, 1.25), "others use the cores; attention is its own"


def test_plans_are_made_by_the_corrected_rates() -> None:
    plan = plan_options(_core, Granularity("none"), RATES, Corrections(0.5, 2.0, 4.0, 5.0)).rates
    assert plan.gemm_flops_per_s == pytest.approx(2e11)
    assert plan.weight_bytes_per_s == pytest.approx(5e9)
    assert plan.attention_flops_per_s == pytest.approx(1.25e10)
    assert plan.cache_bytes_per_s == pytest.approx(2e9)


def test_rates_that_were_learnt_are_kept_where_those_kept_are_far_from_them() -> None:
    for is_exclusive in (True, False):
        assert calibration.mended(RATES, NONE, is_exclusive) is None
        close = Corrections(0.9, 1.1, 0.85, 4.0)
        assert calibration.mended(RATES, close, is_exclusive) is None, "the cache has no rate"
    halved = Corrections(0.5, 0.5, 2.0, 1.0)
    better = calibration.mended(RATES, halved, is_exclusive=False)
    assert better == MachineRates(2e11, 5e10, 2e10, 1e-3), "others may have slowed the attention"
    assert calibration.mended(RATES, halved, is_exclusive=True) == MachineRates(
        2e11, 2.5e10, 2e10, 1e-3
    )
    slower = Corrections(2.0, 2.0, 2.0, 2.0)
    assert calibration.mended(RATES, slower, is_exclusive=False) is None
    assert calibration.mended(RATES, slower, is_exclusive=True) is not None


def test_executed_segments_are_told_by_kind_of_operator(
    open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, told = open_engine(granularity="budget:2"), list[list[OperatorTime]]()
    cost_model = engine._cost_model
    monkeypatch.setattr(cost_model, "observe_operators", lambda times: told.append(list(times)))
    engine.submit(Request(list(range(200)), SamplingParams(max_tokens=1))).result(60)
    engine.close()  # the event thread learns once the answer is out
    (times,) = told
    shape, total = engine.model_shape, OperatorTime(*map(sum, zip(*times, strict=True)))
    pairs = attention_pairs(200, 0)
    assert total.product_flops == pytest.approx(200 * shape.linear_flops_per_token)
    assert total.weight_bytes == pytest.approx(shape.head_bytes), "of one row: it is read"
    assert total.attention_flops == pytest.approx(pairs * shape.attention_flops_per_pair)
    assert total.cache_bytes == 0
    assert total.segments == len(engine.timeline())
    assert all(time.seconds > 0 and time.other_s > 0 for time in times)


def test_the_timeline_tells_calibration_from_requests(
    open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = open_engine(calibrate=True, cache_dir=str(tmp_path))
    measured = engine.timeline()
    assert {entry.run for entry in measured} == {"calibration"}
    handle = engine.submit(Request([1, 2, 3], SamplingParams(max_tokens=1)))
    handle.result(60)
    since = engine.timeline(len(measured))
    assert {entry.run for entry in since} == {f"prefill {handle.request_id}"}
    assert not {entry.run_id for entry in since} & {entry.run_id for entry in measured}


def test_closing_keeps_rates_that_were_learnt(
    open_engine: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(calibrate=True, cache_dir=str(tmp_path))
    (path,) = tmp_path.glob("rates-*.json")
    cost_model, before = engine._cost_model, json.loads(path.read_text())
    for _ in range(20):
        work = OperatorTime(cost_model.rates.gemm_flops_per_s, 0, 0, 0, 0, 0.25, 100)
        cost_model.observe_operators([work])
    monkeypatch.setattr(cost_model, "observe_operators", lambda times: None)
    engine.submit(Request([1, 2, 3], SamplingParams(max_tokens=1))).result(60)
    engine.close()
    after = json.loads(path.read_text())
    assert after["key"] == before["key"]
    ratio = after["rates"]["gemm_flops_per_s"] / before["rates"]["gemm_flops_per_s"]
    assert ratio == pytest.approx(4.0, rel=0.16)
    assert after["rates"]["attention_flops_per_s"] > before["rates"]["attention_flops_per_s"]
    assert after["rates"]["run_overhead_s"] == before["rates"]["run_overhead_s"]
