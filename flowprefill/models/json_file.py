"""read_json and is_text: the small JSON files of a model folder, checked; used by the readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowprefill.errors import CheckpointError


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object; an absent one is empty unless it is required.

    Raises:
        CheckpointError: missing, not JSON, or no object; names the file.
    """
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path}: missing", param=path.name)
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})", param=path.name) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object", param=path.name)
    return values


def is_text(value: Any) -> bool:
    """Whether a value is text, without lone surrogates, which UTF-8 cannot hold."""
    if not isinstance(value, str):
        return False
    return value.isascii() or value.encode(errors="ignore").decode() == value
