"""Calibration: rates from measured times, kept on disk by machine, model and settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_models import WAIT_S, greedy, prompt_of

from flowprefill import Engine, Request, _core
from flowprefill.engine import calibration
from flowprefill.engine.calibration import RatesFile
from flowprefill.scheduling import MachineRates

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


@pytest.mark.parametrize("settings", [{}, {"kv_cache_gib": 0.001}, {"max_model_len": 20}])
def test_an_engine_calibrates_itself_and_serves(
    open_engine: Callable[..., Engine], tmp_path: Path, settings: dict[str, float]
) -> None:
    engine = open_engine(calibrate=True, cache_dir=str(tmp_path), **settings)
    assert len(list(tmp_path.glob("rates-*.json"))) == 1
    assert engine.rates != MachineRates()
    assert len(engine.submit(Request(prompt_of(10), greedy(3))).result(WAIT_S).token_ids) == 3
    assert engine.stats().kv_blocks_used == 0
    again = open_engine(calibrate=True, cache_dir=str(tmp_path), **settings)
    assert again.rates == engine.rates
