"""Fixtures of the engine's tests: tiny checkpoints on disk, an engine on one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from engine_models import assert_all_free, make_engine, save_tiny

from flowprefill import Engine


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.PreTrainedModel]:
    """Folder and transformers' model."""
    folder = tmp_path_factory.mktemp("engine") / "tiny-llama"
    return folder, save_tiny(folder)


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one token whose embedding is NaN."""
    folder = tmp_path_factory.mktemp("engine") / "tiny-poisoned"
    save_tiny(folder, is_poisoned=True)
    return folder


@pytest.fixture(scope="module")
def engine(tiny: tuple[Path, transformers.PreTrainedModel]) -> Iterator[Engine]:
    """One engine for the tests of a file; each must leave it empty."""
    with make_engine(tiny[0]) as engine:
        yield engine
        assert_all_free(engine)


@pytest.fixture
def open_engine(tiny: tuple[Path, transformers.PreTrainedModel]) -> Iterator[Callable[..., Engine]]:
    """Make an engine of one's own: (settings, folder) -> Engine; closed at the end."""
    engines: list[Engine] = []

    def open_one(folder: Path | None = None, **settings: Any) -> Engine:
        engines.append(make_engine(folder or tiny[0], **settings))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close(0.0)
