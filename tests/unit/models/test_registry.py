"""Model names and paths, and what is said when there is nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from flowprefill.errors import CheckpointError
from flowprefill.models import registry
from flowprefill.models.checkpoint import open_checkpoint
from flowprefill.models.registry import PackagedModel, resolve_model


def test_paths_are_named_by_folder_or_file(tmp_path: Path) -> None:
    folder = tmp_path / "my-model-1.5b"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve_model(folder).model_id == "my-model-1.5b"
    assert resolve_model(str(folder)).path == folder
    file = tmp_path / "tiny.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(file).model_id == "tiny.Q4_1"


def test_a_file_name_that_is_not_utf_8_becomes_a_name_that_replies_can_have(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    file.touch()
    source = resolve_model(str(file))
    assert (source.model_id, source.path) == ("caf\ufffd", file)
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    assert resolve_model(folder).model_id == "\ufffd"


def test_folder_of_one_gguf_stands_for_it(tmp_path: Path) -> None:
    (tmp_path / "only.gguf").write_bytes(b"GGUF")
    assert resolve_model(tmp_path).path == tmp_path / "only.gguf"
    (tmp_path / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"several: only\.gguf, second\.gguf"):
        resolve_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model(tmp_path).path == tmp_path


@pytest.mark.parametrize("source", ["smollm3", "/nowhere/model.gguf", ""])
def test_unknown_model_says_what_is_allowed(source: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected smollm2-135m, a folder") as caught:
        resolve_model(source or tmp_path / "empty.bin")
    assert caught.value.param == "model"


def test_empty_name_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert resolve_model(".").path == Path("only.gguf")
    with pytest.raises(CheckpointError, match="model: got '', expected"):
        resolve_model("")


def test_packaged_model_is_found_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "fake_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "w.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    models = {"fake": PackagedModel("fake_weights", "w.gguf", "pip install fake-weights")}
    monkeypatch.setattr(registry, "PACKAGED_MODELS", models)
    assert resolve_model("fake").path == package / "w.gguf"
    assert resolve_model("fake").model_id == "fake"
    assert "fake_weights" not in sys.modules
    (package / "w.gguf").unlink()
    with pytest.raises(CheckpointError, match="pip install fake-weights"):
        resolve_model("fake")


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"gone": PackagedModel("no_such_package_here", "w.gguf", "pip install gone==1")}
    monkeypatch.setattr(registry, "PACKAGED_MODELS", models)
    with pytest.raises(CheckpointError, match=r"run: pip install gone==1"):
        open_checkpoint("gone")


@pytest.mark.parametrize("source", ["x" * 5000, "~no_such_user/x", "a\0b", "\ud800/x", "a/" * 3000])
def test_what_can_be_no_path_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="model: "):
        resolve_model(source)
