"""read_sampling_defaults: how a model's authors say it is to be sampled; by hf_folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flowprefill.errors import within
from flowprefill.models.json_file import is_text
from flowprefill.models.model_config import bad_field
from flowprefill.models.rope import as_float
from flowprefill.request import MAX_STOP_STRINGS

# Of generation_config.json, what a server takes over as vLLM does: lowest and highest value.
FIELDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 10.0),
    "max_new_tokens": (1, 2**31 - 1),
}
_WHOLE = ("top_k", "max_new_tokens")


def read_sampling_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of generation_config.json that say how tokens are chosen, without nulls.

    Raises:
        CheckpointError: a value of the wrong kind or out of its range; names the field.
    """
    found: dict[str, Any] = _stop_strings(values.get("stop_strings"))
    for name, (low, high) in FIELDS.items():
        if values.get(name) is None:
            continue
        number = as_float(values[name])
        is_whole = number is not None and math.isfinite(number) and number == int(number)
        if number is None or not low <= number <= high or (name in _WHOLE and not is_whole):
            kind = "an integer" if name in _WHOLE else "a number"
            allowed = f"{kind} {within(low, high)} or null"
            raise bad_field(name, values[name], allowed)
        found[name] = int(number) if name in _WHOLE else number
    return found


def _stop_strings(value: Any) -> dict[str, Any]:
    """Read the texts that end an output, one or a list of them."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    is_list = isinstance(texts, list) and len(texts) <= MAX_STOP_STRINGS
    if not is_list or not all(text and is_text(text) for text in texts):
        allowed = f"text that is not empty, a list of at most {MAX_STOP_STRINGS} such, or null"
        raise bad_field("stop_strings", value, allowed)
    return {"stop_strings": tuple(texts)} if texts else {}
