"""Fixtures of the engine's own tests: an engine on a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from schema_generator import VOCAB, PieceTokenizer
from tiny_models import SERVED, save_with_tokenizer, tiny_model

from flowprefill import Engine, EngineConfig
from flowprefill.engine.grammars import Grammars


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny Llama with the default model's tokenizer."""
    folder = tmp_path_factory.mktemp("engine") / "tiny-llama"
    save_with_tokenizer(tiny_model("llama", **SERVED), folder)
    return folder


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    """The compiler of structured output, over a small vocabulary."""
    made = Grammars(PieceTokenizer(), VOCAB)  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture
def open_engine(tiny: Path) -> Iterator[Callable[..., Engine]]:
    """Make an uncalibrated float32 engine of one thread unless told otherwise."""
    engines: list[Engine] = []
    defaults: dict[str, Any] = {
        "calibrate": False,
        "dtype": "f32",
        "threads": 1,
        "kv_cache_gib": 0.02,
    }

    def open_one(**settings: Any) -> Engine:
        engines.append(Engine(tiny, EngineConfig(**(defaults | settings))))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close(0.0)
