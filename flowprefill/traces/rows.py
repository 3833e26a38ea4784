"""Rows of a trace file, with errors that name file, line, field and value; used by the readers."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowprefill.errors import ConfigError, shortened


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file.

    Attributes:
        place: file and line, ``trace.csv:3``.
        values: field -> value; text in CSV files, any JSON value in JSONL files.
    """

    place: str
    values: Mapping[str, Any]

    def refuse(self, name: str, allowed: str) -> ConfigError:
        """Return the error for one field; the caller raises it."""
        given = shortened(self.values[name]) if name in self.values else "nothing"
        message = f"trace: {self.place}: {name}: got {given}, expected {allowed}"
        return ConfigError(message, param="trace")

    def number(self, name: str) -> float:
        """Return a finite number; ConfigError if it is none."""
        value = self.values.get(name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.refuse(name, "a number")
        return number

    def count(self, name: str, least: int) -> int:
        """Return a whole number >= least; ConfigError if it is none."""
        number = self.number(name)
        if number < least or number != math.floor(number):
            raise self.refuse(name, f"an integer >= {least}")
        return int(number)

    def text(self, name: str) -> str:
        """Return a text that is not empty; ConfigError if it is none."""
        value = self.values.get(name)
        if not isinstance(value, str) or not value:
            raise self.refuse(name, "a text")
        return value


def json_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSONL file; empty lines are passed over."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if not isinstance(values, dict):
                given = shortened(line.strip())
                message = f"trace: {place}: got {given}, expected a JSON object"
                raise ConfigError(message, param="trace")
            yield Row(place, values)


def csv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file whose first line names the columns."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for values in reader:
            given = {key: value for key, value in values.items() if key and value is not None}
            yield Row(f"{path}:{reader.line_num}", given)
