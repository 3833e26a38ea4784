"""read_tokenizer_json: looks at tokenizer.json before the tokenizers library does; by hf_tokenizer.

The library makes room for every id up to the largest one, so a single id of four thousand million
would take all memory, or abort the process. Its patterns may take a time that grows exponentially
with the prompt, and replacements can make a prompt a thousand times longer, step after step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowprefill.errors import CheckpointError, shortened
from flowprefill.models.split_pattern import why_slow

# The largest vocabularies have a quarter of a million tokens; their ids have few gaps.
MAX_TOKEN_ID = 1 << 23
# Byte-level vocabularies need 2, a mark for spaces 1.
MAX_GROWTH = 64
PARTS = ("normalizer", "pre_tokenizer", "decoder")


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """Read a ``tokenizer.json`` and check its token ids, patterns and replacements.

    Raises:
        CheckpointError: not a JSON object, an id that is no integer in 0..MAX_TOKEN_ID, a pattern
            that may take for ever, or replacements that make a text longer than MAX_GROWTH times.
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
    for part in PARTS:
        _check_steps(path, part, values.get(part))
    return values


def _check_steps(path: Path, part: str, value: Any) -> None:
    """Check every pattern in a part of the file, however deep, and what its replacements add."""
    growth = 1
    rest = [value]
    while rest:
        step = rest.pop()
        if isinstance(step, list):
            rest.extend(step)
        if not isinstance(step, dict):
            continue
        rest.extend(step.values())
        reason = why_slow(step.get("Regex"))
        if reason:
            shown = shortened(step["Regex"])
            raise _bad(path, f"{part}: pattern {shown} {reason}: it may take for ever on a prompt")
        content = step.get("content")
        if isinstance(content, str):
            growth *= max(len(content.encode(errors="replace")), 1)
        if growth > MAX_GROWTH:
            grown = f"its replacements make a text more than {MAX_GROWTH} times longer"
            raise _bad(path, f"{part}: {grown}, expected at most that")


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
