"""Models named as on the hub are found in its cache, or the error says what downloads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowprefill.errors import CheckpointError
from flowprefill.models.hub_cache import HubName, hub_cache_folder
from flowprefill.models.registry import resolve_model

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def download(cache: Path, repo: str, files: dict[str, str], commit: str, ref: str = "main") -> Path:
    """Lay a repository down as the hub's tools do: snapshots link to blobs."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for index, (name, text) in enumerate(files.items()):
        blob = folder / "blobs" / f"{commit}{index}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(text)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    if ref:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


WHOLE = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": ""}


def test_a_downloaded_model_is_found_by_its_name(cache: Path) -> None:
    snapshot = download(cache, "org/My-Model.1", WHOLE, COMMIT)
    download(cache, "org/My-Model.1", WHOLE, OTHER, "pr/1")
    found = resolve_model("org/My-Model.1")
    assert (found.model_id, found.path) == ("org/My-Model.1", snapshot)
    for revision in ("pr/1", OTHER):
        other = resolve_model(f"org/My-Model.1@{revision}").path
        assert other == snapshot.parent / OTHER


def test_without_a_main_the_only_snapshot_counts(cache: Path) -> None:
    snapshot = download(cache, "org/one", WHOLE, COMMIT, ref="")
    assert resolve_model("org/one").path == snapshot
    download(cache, "org/one", WHOLE, OTHER, ref="")
    with pytest.raises(CheckpointError, match=r"hf download org/one$"):
        resolve_model("org/one")


def test_a_gguf_is_found_in_a_repository_of_several(cache: Path) -> None:
    files = {"m.Q4_0.gguf": "", "sub/m.Q8_0.gguf": "", "other.gguf": ""}
    snapshot = download(cache, "org/quants", files, COMMIT)
    found = resolve_model("org/quants/sub/m.Q8_0.gguf")
    assert (found.model_id, found.path) == ("org/quants", snapshot / "sub/m.Q8_0.gguf")
    with pytest.raises(CheckpointError, match=r"m\.Q4_0\.gguf, other\.gguf; name one"):
        resolve_model("org/quants")
    with pytest.raises(CheckpointError, match=r"run: hf download org/quants m\.Q2_K\.gguf$"):
        resolve_model("org/quants/m.Q2_K.gguf")


def test_a_folder_of_that_name_wins(cache: Path) -> None:
    download(cache, "org/name", WHOLE, COMMIT)
    (cache.parent / "org/name").mkdir(parents=True)
    assert resolve_model("org/name").path == Path("org/name")


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("org/absent", "hf download org/absent"),
        ("org/absent@v2", "hf download org/absent --revision v2"),
        ("org/absent/x.gguf@v2", "hf download org/absent x.gguf --revision v2"),
    ],
)
def test_an_absent_model_says_what_downloads_it(cache: Path, source: str, command: str) -> None:
    with pytest.raises(CheckpointError, match="not in the hub's cache") as caught:
        resolve_model(source)
    assert caught.value.message.endswith(f"to download it, run: {command}")
    assert str(cache) in caught.value.message


INDEX = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"config.json": None}, "config.json"),
        ({"tokenizer.json": None}, "tokenizer.json"),
        ({"model.safetensors": None}, "model.safetensors"),
        (
            {"model.safetensors": None, "model.safetensors.index.json": INDEX,
             "model-1.safetensors": ""},
            "model-2.safetensors",
        ),
    ],
)  # fmt: skip
def test_half_a_download_is_named(cache: Path, changes: dict[str, Any], missing: str) -> None:
    files = {name: text for name, text in (WHOLE | changes).items() if text is not None}
    download(cache, "org/half", files, COMMIT)
    with pytest.raises(CheckpointError, match=rf"{missing} is missing; .*run: hf download org/hal"):
        resolve_model("org/half")


def test_a_part_that_was_not_downloaded_is_named(cache: Path) -> None:
    snapshot = download(cache, "org/q", {"big-00001-of-00002.gguf": ""}, COMMIT)
    with pytest.raises(CheckpointError, match=r"hf download org/q big-00002-of-00002\.gguf$"):
        resolve_model("org/q/big-00001-of-00002.gguf")
    (snapshot / "big-00001-of-00002.gguf").resolve().unlink()
    with pytest.raises(
        CheckpointError, match=r"00001-of-00002\.gguf is missing; .*download org/q$"
    ):
        resolve_model("org/q")


def test_a_repository_of_gguf_files_may_have_a_config(cache: Path) -> None:
    snapshot = download(cache, "org/q", {"m.gguf": "", "config.json": "{}"}, COMMIT)
    assert resolve_model("org/q").path == resolve_model(snapshot).path == snapshot / "m.gguf"
    download(cache, "org/both", WHOLE | {"m.gguf": ""}, COMMIT)
    assert resolve_model("org/both").path.name == COMMIT


@pytest.mark.parametrize("text", ["../x", "a/../b", "/a/b", "a/b/c", "a", "a b/c", "a/.b", "a/b@"])
def test_what_is_no_name_on_the_hub(text: str) -> None:
    assert HubName.parse(text) is None


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"),
        ({"HF_HOME": "/h"}, "/h/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/o", "HF_HOME": "/h"}, "/o"),
        ({"HF_HOME": "$HOME/h"}, str(Path("~/h/hub").expanduser())),
        ({"HF_HUB_CACHE": "~no_such_user/h"}, "~no_such_user/h"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({}, str(Path("~/.cache/huggingface/hub").expanduser())),
    ],
)
def test_the_cache_is_where_the_hubs_tools_have_it(
    environment: dict[str, str], folder: str
) -> None:
    assert hub_cache_folder(environment) == Path(folder)
