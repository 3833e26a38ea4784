"""Readers of published request traces and of plain CSV files; `read_trace` finds the format.

Each turns one file into a `Trace` whose first request arrives at 0. Objectives are not in these
files (but may be in plain CSV): `flowprefill.traces.objectives` adds them. A bad row raises
ConfigError with file, line, field, value and what is allowed.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from flowprefill.errors import ConfigError
from flowprefill.traces.rows import Row, csv_rows, json_rows
from flowprefill.traces.trace import Trace, TraceRequest

QWEN_BLOCK_TOKENS = 16  # of one entry of the Qwen traces' hash_ids
MOONCAKE_GRID_S = 3.0  # its conversation file states times as multiples of this
GRID_ERROR_S = 0.002
SINGLE_TURN_CLASSES = frozenset({"text"})  # the others keep their whole prompt at later turns


def read_trace(path: str | Path, format: str = "auto", *, seed: int = 0) -> Trace:
    """Read a trace file.

    Args:
        path: JSONL or CSV (by its ending, ``.csv`` or anything else).
        format: one of `FORMATS`, or ``auto``: by the fields of the first row.
        seed: of times that a format leaves open (mooncake).

    Raises:
        ConfigError: the file cannot be read, is empty, its format is unknown, or a row is bad.
    """
    path = Path(path)
    try:
        rows = list(csv_rows(path) if path.suffix.lower() == ".csv" else json_rows(path))
    except OSError as error:
        message = f"trace: got {str(path)!r}, expected a file that can be read ({error.strerror})"
        raise ConfigError(message, param="trace") from None
    except (UnicodeDecodeError, csv.Error) as error:
        message = f"trace: {path}: {error}, expected lines of text in UTF-8"
        raise ConfigError(message, param="trace") from None
    if not rows:
        raise ConfigError(f"trace: {path} is empty", param="trace")
    name = _detected(rows[0]) if format == "auto" else format
    if name not in FORMATS:
        known = ", ".join(["auto", *FORMATS])
        raise ConfigError(f"trace format: got {name!r}, expected one of {known}", param="format")
    requests = _off_the_grid(FORMATS[name].read(rows), FORMATS[name].grid_s, seed)
    if not requests:
        raise ConfigError(f"trace: {path} holds no usable request", param="trace")
    return Trace(path.name, tuple(_from_zero(requests)))


def _off_the_grid(requests: list[TraceRequest], grid_s: float, seed: int) -> list[TraceRequest]:
    """Give each request a uniform place in its step, if all times are multiples of grid_s.

    On the grid itself all requests of a step would arrive at once, which they did not. Times that
    were cut to milliseconds may lie one off it.
    """
    times_s = {request.at_s for request in requests}
    if grid_s == 0 or len(times_s) < 2:
        return requests
    if any(abs(time_s - grid_s * round(time_s / grid_s)) > GRID_ERROR_S for time_s in times_s):
        return requests
    rng = random.Random(seed)
    return [
        replace(request, at_s=grid_s * (round(request.at_s / grid_s) + rng.random()))
        for request in requests
    ]


def _from_zero(requests: Iterable[TraceRequest]) -> list[TraceRequest]:
    ordered = sorted(requests, key=lambda request: request.at_s)
    first_s = ordered[0].at_s
    return [replace(request, at_s=request.at_s - first_s) for request in ordered]


def _detected(row: Row) -> str:
    for name, one in FORMATS.items():
        if one.fields <= row.values.keys():
            return name
    fields = ", ".join(sorted(row.values))
    known = "; ".join(f"{name}: {', '.join(sorted(one.fields))}" for name, one in FORMATS.items())
    message = f"trace: {row.place}: fields {fields}, expected those of a known format ({known})"
    raise ConfigError(message, param="trace")


def _qwen(rows: Sequence[Row]) -> list[TraceRequest]:
    """Qwen-Bailian: seconds, tokens and a class.

    Upstream rows carry ``hash_ids`` and the whole conversation as prompt. For these the
    *single-turn step* is done: a later turn of class text counts only the blocks that its parent
    does not have. Rows without ``hash_ids`` are taken as they are: that step's own output.
    """
    blocks = {row.values.get("chat_id"): _qwen_blocks(row) for row in rows}
    return [
        TraceRequest(
            _seconds(row, "timestamp"),
            _qwen_tokens(row, blocks),
            max(1, row.count("output_length", 0)),
            row.text("type"),
        )
        for row in rows
    ]


def _qwen_blocks(row: Row) -> int:
    return -(-row.count("input_length", 1) // QWEN_BLOCK_TOKENS)


def _qwen_tokens(row: Row, blocks: dict[object, int]) -> int:
    parent = row.values.get("parent_chat_id", -1)
    is_later_turn = "hash_ids" in row.values and parent in blocks
    if not is_later_turn or row.values.get("type") not in SINGLE_TURN_CLASSES:
        return row.count("input_length", 1)
    return QWEN_BLOCK_TOKENS * max(1, _qwen_blocks(row) - blocks[parent])


def _mooncake(rows: Sequence[Row]) -> list[TraceRequest]:
    """Mooncake: milliseconds and tokens, no class."""
    return [
        _counted(row, _seconds(row, "timestamp", 1e-3), "input_length", "output_length")
        for row in rows
    ]


def _azure(rows: Sequence[Row]) -> list[TraceRequest]:
    """Azure 2023 and 2024: dates (UTC) and tokens; the file is the class."""
    first_s = _date_s(rows[0])
    return [
        _counted(row, _date_s(row) - first_s, "ContextTokens", "GeneratedTokens") for row in rows
    ]


def _burstgpt(rows: Sequence[Row]) -> list[TraceRequest]:
    """BurstGPT: seconds, model, tokens; failed requests (no response tokens) are left out."""
    return [
        TraceRequest(
            _seconds(row, "Timestamp"),
            row.count("Request tokens", 1),
            row.count("Response tokens", 1),
            str(row.values.get("Model", "")),
        )
        for row in rows
        if row.count("Response tokens", 0) > 0
    ]


def _servegen(rows: Sequence[Row]) -> list[TraceRequest]:
    """ServeGen: what its generator writes to CSV: seconds and tokens."""
    return [
        _counted(row, _seconds(row, "timestamp"), "input_tokens", "output_tokens") for row in rows
    ]


def _plain(rows: Sequence[Row]) -> list[TraceRequest]:
    """Plain: a field for each attribute of `TraceRequest`; all but time and prompt may miss."""
    found = []
    for row in rows:
        given = {name for name, value in row.values.items() if value not in ("", None)}
        objectives = {name: row.number(name) for name in ("ttft_s", "tpot_s") if name in given}
        for name, value in objectives.items():
            if value <= 0:
                raise row.refuse(name, "seconds > 0")
        found.append(
            TraceRequest(
                _seconds(row, "at_s"),
                row.count("prompt_tokens", 1),
                row.count("output_tokens", 1) if "output_tokens" in given else 1,
                str(row.values.get("service_class") or ""),
                **objectives,
            )
        )
    return found


def _counted(row: Row, at_s: float, prompt: str, output: str) -> TraceRequest:
    """Return a request of which the file has two counts of tokens, and no class."""
    return TraceRequest(at_s, row.count(prompt, 1), max(1, row.count(output, 0)))


def _seconds(row: Row, name: str, unit_s: float = 1.0) -> float:
    value = row.number(name)
    if value < 0:
        raise row.refuse(name, "a time >= 0")
    return value * unit_s


def _date_s(row: Row) -> float:
    name = "TIMESTAMP"
    text = row.text(name)
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        raise row.refuse(name, "a date like 2023-11-16 18:15:46.6805900") from None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """One format.

    Attributes:
        fields: a row with all of these has this format; formats are tried in order.
        read: rows -> requests in any order.
        grid_s: files whose times are all multiples of it have lost the times in between.
    """

    fields: frozenset[str]
    read: Callable[[Sequence[Row]], list[TraceRequest]]
    grid_s: float = 0.0


FORMATS = {
    "qwen": TraceFormat(frozenset({"timestamp", "input_length", "output_length", "type"}), _qwen),
    "mooncake": TraceFormat(
        frozenset({"timestamp", "input_length", "output_length"}), _mooncake, MOONCAKE_GRID_S
    ),
    "azure": TraceFormat(frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}), _azure),
    "burstgpt": TraceFormat(
        frozenset({"Timestamp", "Request tokens", "Response tokens"}), _burstgpt
    ),
    "servegen": TraceFormat(frozenset({"timestamp", "input_tokens", "output_tokens"}), _servegen),
    "csv": TraceFormat(frozenset({"at_s", "prompt_tokens"}), _plain),
}
