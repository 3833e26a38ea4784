"""`flowprefill bench compare OLD NEW`: two reports of one bench side by side, as ratios.

Rows are paired by their text fields and by what was measured (granularity, tokens and so on); of
each number that both have, the ratio new / old is printed. Reports of different machines or
settings are compared all the same, and the difference is said: such ratios tell little.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowprefill.bench.report import Report, Row, json_path, print_table
from flowprefill.errors import ConfigError

# Whole numbers that say what was measured, not how it went.
NAMING = ("tokens", "batch", "waiting", "context", "run_ahead")
COLUMNS = {"row": "row", "field": "field", "old": "old", "new": "new", "ratio": "new / old"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this bench's arguments."""
    parser.add_argument("old", type=Path, help="report written with --json, before a change")
    parser.add_argument("new", type=Path, help="the same after it")
    parser.add_argument("--json", type=json_path, help="write the table as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit status.

    Raises:
        ConfigError: a file is no report.
    """
    old, new = read_report(args.old), read_report(args.new)
    for text in differences(old, new):
        print(text)  # noqa: T201
    rows = list(ratios(old["rows"], new["rows"]))
    print_table(f"{new['bench']}: new / old", rows, COLUMNS)
    names = {"old": old.get("commit"), "new": new.get("commit")}
    Report("compare", {"of": new["bench"], **names}, rows).write(args.json)
    return 0


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each thing that should be the same and is not."""
    if old["bench"] != new["bench"]:
        yield f"bench: {old['bench']} against {new['bench']}"
    for part in ("machine", "settings"):
        before, after = old.get(part, {}), new.get(part, {})
        for key in sorted({*before, *after}):
            if not key.startswith("load_") and before.get(key) != after.get(key):
                yield f"{part}.{key}: {before.get(key)} against {after.get(key)}"


def ratios(old: list[Row], new: list[Row]) -> Iterator[Row]:
    """Yield a row for each number of each pair of rows that name the same thing."""
    before = {_name(row): row for row in old}
    for row in new:
        other = before.get(_name(row), {})
        for key, value in row.items():
            known = other.get(key)
            if key in NAMING or not _is_number(value) or not _is_number(known):
                continue
            ratio = value / known if known else None
            yield {"row": _name(row), "field": key, "old": known, "new": value, "ratio": ratio}


def _is_report(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("bench"), str):
        return False
    rows, parts = found.get("rows"), [found.get(part, {}) for part in ("machine", "settings")]
    return (
        isinstance(rows, list)
        and all(isinstance(row, dict) for row in rows)
        and all(isinstance(part, dict) for part in parts)
    )


def _name(row: Row) -> str:
    return " ".join(str(v) for k, v in row.items() if isinstance(v, str) or k in NAMING)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_report(path: Path) -> dict[str, Any]:
    """Read what a bench wrote with ``--json``; raises ConfigError for anything else."""
    try:
        found: Any = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"report {path}: {error.strerror}", param="report") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"report {path}: {error}", param="report") from None
    if not _is_report(found):
        raise ConfigError(
            f"report {path}: expected what a bench writes with --json", param="report"
        )
    read: dict[str, Any] = found
    return read
