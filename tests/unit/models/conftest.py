"""Fixtures of the checkpoint tests: tiny models saved on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_files import TINY, TinyGguf
from tiny_models import tiny_model

from flowprefill.models.checkpoint import open_checkpoint


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., tuple[transformers.PreTrainedModel, Path]]:
    """Make and save a tiny model: (family, shard size, settings) -> (model, folder)."""

    def save(
        family: str, shard: str = "5GB", **settings: Any
    ) -> tuple[transformers.PreTrainedModel, Path]:
        model = tiny_model(family, **(TINY | settings))
        folder = tmp_path / f"tiny-{family}"
        model.save_pretrained(folder, max_shard_size=shard)
        return model, folder

    return save


@pytest.fixture
def tiny_gguf(save_tiny: Any) -> Callable[..., TinyGguf]:
    """Make an unwritten GGUF of a tiny model: (family, settings) -> TinyGguf."""

    def make(family: str = "llama", **settings: Any) -> TinyGguf:
        _, folder = save_tiny(family, **settings)
        return TinyGguf(open_checkpoint(folder), "llama" if family == "mistral" else family)

    return make
