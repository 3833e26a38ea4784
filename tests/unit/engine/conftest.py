"""Fixtures of the engine's own tests: an engine on a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_with_tokenizer, tiny_model

from flowprefill import Engine, EngineConfig


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny Llama with the default model's tokenizer."""
    folder = tmp_path_factory.mktemp("engine") / "tiny-llama"
    model = tiny_model(
        "llama", vocab_size=49_152, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=16_384,
        pad_token_id=None,
    )  # fmt: skip
    save_with_tokenizer(model, folder)
    return folder


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
