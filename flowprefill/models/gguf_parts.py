"""GGUF models split into several files, as gguf-split names them; by gguf_file and registry.

Each file is a GGUF of its own. The first has all keys of the model, the others tensors only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from flowprefill.errors import CheckpointError
from flowprefill.models.gguf_metadata import GgufMetadata

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 10_000
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


def model_name(path: Path) -> str:
    """Name of the model in a file: without the number of the part."""
    match = _PART.fullmatch(path.name)
    return match["stem"] if match else path.stem


def one_model(paths: Sequence[Path]) -> Path | None:
    """Return the file to open where some files are one model, whole or split; else None."""
    if len(paths) == 1:
        return paths[0]
    matches = [_PART.fullmatch(path.name) for path in paths]
    models = {match and (match["stem"], match["count"]) for match in matches}
    return min(paths) if len(models) == 1 and None not in models else None


def part_names(path: Path) -> list[str]:
    """Names of all files of the model that a file is part of, by its own; itself if it is whole."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) > MAX_PARTS:
        return [path.name]
    count = int(match["count"])
    return [f"{match['stem']}-{part + 1:05}-of-{count:05}.gguf" for part in range(count)]


def ggufs_of(folder: Path) -> list[Path]:
    """Return the GGUF files that a folder is about: none where it holds safetensors.

    Repositories of GGUF files may have the config.json of the model they are made of.
    """
    is_hf = (folder / "config.json").exists() and any(folder.glob("*.safetensors*"))
    return [] if is_hf else sorted(folder.glob("*.gguf"))


def read_gguf(path: Path) -> GgufMetadata:
    """Open a GGUF, and if it is part of a split model the other parts as well.

    Args:
        path: the file, or any part.

    Raises:
        CheckpointError: see GgufMetadata; or a part is missing or belongs to another model.
    """
    metadata = GgufMetadata(path)
    count = metadata.get(_COUNT, int, 0)
    if count <= 1:
        return metadata
    if count > MAX_PARTS:
        allowed = f"at most {MAX_PARTS}"
        raise CheckpointError(f"{path}: {_COUNT}: got {count}, expected {allowed}", param=_COUNT)
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        allowed = f"NAME-00001-of-{count:05}.gguf, as {_COUNT} is {count}"
        raise CheckpointError(
            f"{path}: file name of a part of a split model, expected {allowed}", param="model"
        )
    names = part_names(path)
    first = _part(path.with_name(names[0]), 0, count)
    for number, name in enumerate(names[1:], start=1):
        first.add_part(_part(path.with_name(name), number, count))
    expected = first.get(_TENSORS, int, len(first.tensors))
    if expected != len(first.tensors):
        raise CheckpointError(
            f"{first.path}: {_TENSORS}: got {expected}, the {count} parts have "
            f"{len(first.tensors)} tensors", param=_TENSORS,
        )  # fmt: skip
    return first


def _part(path: Path, number: int, count: int) -> GgufMetadata:
    if not path.is_file():
        message = f"{path}: missing, part {number + 1} of {count} of a split model ({_COUNT})"
        raise CheckpointError(message, param="model")
    part = GgufMetadata(path)
    found = part.get(_NUMBER, int), part.get(_COUNT, int)
    if found != (number, count):
        message = f"{path}: {_NUMBER}, {_COUNT}: got {found}, expected {(number, count)}"
        raise CheckpointError(message, param=_NUMBER)
    return part
