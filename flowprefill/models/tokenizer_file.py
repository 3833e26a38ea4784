"""check_token_numbers: looks at tokenizer.json before the tokenizers library does; by hf_folder.

The library makes room for every id up to the largest one, so a single id of four thousand million
would take all memory, or abort the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowprefill.errors import CheckpointError, shortened

# The largest vocabularies have a quarter of a million tokens; their ids have few gaps.
MAX_TOKEN_ID = 1 << 23


def check_token_numbers(path: Path) -> None:
    """Check every token id of a ``tokenizer.json``.

    Raises:
        CheckpointError: not a JSON object, or an id that is no integer in 0..MAX_TOKEN_ID.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise _bad(path, f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise _bad(path, "expected a JSON object")
    for name, token_id in _ids(values):
        is_id = isinstance(token_id, int) and not isinstance(token_id, bool)
        if not is_id or not 0 <= token_id <= MAX_TOKEN_ID:
            allowed = f"an integer in 0..{MAX_TOKEN_ID}"
            raise _bad(path, f"{name}: got {shortened(token_id)}, expected {allowed}")


def _ids(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Give the ids with the names of their fields; what is of another shape the library refuses."""
    model = values.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        for token, token_id in vocabulary.items():
            yield f"model.vocab[{shortened(token)}]", token_id
    added = values.get("added_tokens")
    for index, token in enumerate(added if isinstance(added, list) else ()):
        if isinstance(token, dict):
            yield f"added_tokens[{index}].id", token.get("id")


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}", param="tokenizer.json")
