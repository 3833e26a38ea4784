"""Fixtures of every test of a device: the device, runs of native models on it, engines on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from cases import Runner, Saved, save, settings_of
from devices import DEVICES, Device
from engines import assert_all_free
from tiny_models import save_with_tokenizer, tiny_model

from flowprefill import Engine

POISON = 7  # the token whose embedding is NaN in poisoned models


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The device of this test: one of those named by `on`, or the CPU."""
    found: Device = getattr(request, "param", DEVICES["cpu"])
    found.enter(monkeypatch)
    return found


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Device, str], Saved]:
    """Make, save and evaluate a case of CASES once for each shape of a device."""

    @cache
    def save_once(case: str, is_cuda: bool) -> Saved:
        family, shape = settings_of(DEVICES["cuda" if is_cuda else "cpu"], case)
        model = tiny_model(family, spread=0.15 if is_cuda else 0.12, rounds=is_cuda, **shape)
        return save(model, tmp_path_factory.mktemp("tiny") / case)

    return lambda device, case: save_once(case, device.is_cuda)


@pytest.fixture(scope="session")
def _runners(saved: Callable[[Device, str], Saved]) -> Iterator[Callable[..., Runner]]:
    opened: list[Runner] = []

    @cache
    def open_runner(name: str, case: str, **options: Any) -> Runner:
        device = DEVICES[name]
        opened.append(Runner(device, saved(device, case), **options))
        return opened[-1]

    yield open_runner
    for one in opened:
        one.close()


@pytest.fixture
def runner(device: Device, _runners: Callable[..., Runner]) -> Callable[..., Runner]:
    """Load a case on the test's device: (case, options of Runner) -> Runner; each once."""
    return lambda case, **options: _runners(device.name, case, **options)


@pytest.fixture
def open_runner(
    device: Device, saved: Callable[[Device, str], Saved]
) -> Iterator[Callable[..., Runner]]:
    """The same, but one of this test's own, closed at its end."""
    opened: list[Runner] = []

    def open_one(case: str = "llama-grouped", **options: Any) -> Runner:
        opened.append(Runner(device, saved(device, case), **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


# ---- engines

Tiny = tuple[Path, transformers.PreTrainedModel]


@pytest.fixture(scope="session")
def _served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, bool], Tiny]:
    @cache
    def save_served(is_cuda: bool, is_poisoned: bool) -> Tiny:
        shape = DEVICES["cuda" if is_cuda else "cpu"].served
        model: Any = tiny_model("llama", spread=0.15 if is_cuda else 0.2, rounds=is_cuda, **shape)
        if is_poisoned:
            model.get_input_embeddings().weight.data[POISON] = float("nan")
        folder = tmp_path_factory.mktemp("served") / "tiny-llama"
        save_with_tokenizer(model, folder)
        return folder, model

    return save_served


@pytest.fixture
def tiny(device: Device, _served: Callable[[bool, bool], Tiny]) -> Tiny:
    """Folder and transformers' model of what engines serve."""
    return _served(device.is_cuda, False)


@pytest.fixture
def poisoned(_served: Callable[[bool, bool], Tiny]) -> Path:
    """A folder for the CPU with one token whose embedding is NaN."""
    return _served(False, True)[0]


@pytest.fixture(scope="module")
def engine(_served: Callable[[bool, bool], Tiny]) -> Iterator[Engine]:
    """One engine on the CPU for the tests of a file; each must leave it empty."""
    with DEVICES["cpu"].open_engine(_served(False, False)[0]) as engine:
        yield engine
        assert_all_free(engine)


@pytest.fixture
def open_engine(device: Device, tiny: Tiny, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Make an engine on the test's device: (settings, folder) -> Engine; closed at the end."""
    engines: list[Engine] = []

    def open_one(folder: Path | None = None, **settings: Any) -> Engine:
        settings = {"cache_dir": str(tmp_path)} | settings
        engines.append(device.open_engine(folder or tiny[0], **settings))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close(0.0)


@pytest.fixture
def set_options(device: Device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the CUDA models of this test made with these options, whatever the engine says."""

    def set_them(**options: Any) -> None:
        if device.is_cuda:
            make = device.module.Model
            monkeypatch.setattr(
                device.module, "Model", lambda graph, given: make(graph, given | options)
            )

    return set_them
