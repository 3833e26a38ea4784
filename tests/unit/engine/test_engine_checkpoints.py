"""The engine on checkpoints as people have them: own template, stretched contexts, named ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import greedy, prompt_of

from flowprefill import Engine, EngineConfig, Request, SamplingParams
from flowprefill.errors import CheckpointError, ConfigError, InvalidRequest

OpenEngine = Callable[..., Engine]
USER = [{"role": "user", "content": "Hi"}]


def open_at(folder: Path, max_model_len: int = 0) -> Engine:
    settings: dict[str, Any] = {"calibrate": False, "dtype": "f32", "threads": 1}
    return Engine(folder, EngineConfig(max_model_len=max_model_len, kv_cache_gib=0.02, **settings))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint by links, whose small files can be replaced."""
    for file in tiny.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def test_a_template_of_ones_own_replaces_the_models(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].content }} by {{ messages[0].role }}")
    engine = open_engine(chat_template=str(path))
    assert engine.render_chat(USER) == "Hi by user"
    with pytest.raises(InvalidRequest, match="no chat template"):
        open_engine().render_chat(USER)
    with pytest.raises(ConfigError, match="chat_template: got"):
        open_engine(chat_template=str(tmp_path / "absent"))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope"])
def test_stretched_models_serve_what_they_reach(folder: Path, kind: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    scaling: dict[str, Any] = {"rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config |= {"max_position_embeddings": 128, "rope_theta": 1e4, "rope_scaling": scaling}
    path.unlink()
    path.write_text(json.dumps(config))
    for asked, served in ((0, 512), (512, 512), (100, 100)):
        with open_at(folder, asked) as engine:
            assert engine.max_model_len == served
    with pytest.raises((CheckpointError, ConfigError), match="max_model_len"):
        open_at(folder, 513)


def test_the_tokenizers_end_ends_a_text(folder: Path) -> None:
    """Its name stands in special_tokens_map.json only; config.json has another end."""
    prompt = prompt_of(10, seed=4)
    with open_at(folder) as engine:
        free = engine.submit(Request(prompt, greedy(6))).result().token_ids
        name = engine.tokenizer._inner.id_to_token(free[2])
    assert free[2] not in free[:2]
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": name}))
    with open_at(folder) as engine:
        sampling = SamplingParams(max_tokens=6, temperature=0.0)
        completion = engine.submit(Request(prompt, sampling)).result()
    assert completion.token_ids == free[:3]
    assert completion.finish_reason == "stop"
