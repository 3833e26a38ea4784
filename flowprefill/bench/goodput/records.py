"""Records: every measurement made so far, in a JSON file, so that a bench can be resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowprefill.bench.goodput.measurement import Measurement
from flowprefill.errors import ConfigError

WRITE_EVERY_S = 5.0  # fast backends make hundreds of measurements a second


class Records:
    """Measurements by key; written to a file, if there is one, as they come."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """Read the file if it is there.

        Args:
            settings: what all measurements depend on; of JSON's types.

        Raises:
            ConfigError: the file holds measurements of other settings, or is none of ours.
        """
        self._path, self._settings = path, json.loads(json.dumps(settings))
        self._found: dict[str, Measurement] = {}
        self._written_s = time.monotonic()
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Measurement:
        return self._found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def add(self, key: str, measurement: Measurement) -> None:
        """Keep one; the file may lag behind by a few seconds until `write`."""
        self._found[key] = measurement
        if time.monotonic() - self._written_s > WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write the file now; a reader meanwhile sees the old or the new one whole."""
        self._written_s = time.monotonic()
        if self._path is None:
            return
        values = {key: one.to_dict() for key, one in self._found.items()}
        text = json.dumps({"settings": self._settings, "measurements": values})
        draft = self._path.with_name(self._path.name + ".new")
        draft.write_text(text)
        draft.replace(self._path)

    def _read(self, path: Path) -> None:
        try:
            values = json.loads(path.read_text())
            given = values["settings"]
            self._found = {
                key: Measurement.from_dict(one) for key, one in values["measurements"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            message = f"resume: {path}: {error}, expected a file of an earlier run"
            raise ConfigError(message, param="resume") from None
        for name in sorted({*given, *self._settings}):
            if given.get(name) != self._settings.get(name):
                message = (
                    f"resume: {path} was measured with {name} {given.get(name)!r}, now it is "
                    f"{self._settings.get(name)!r}: use another file"
                )
                raise ConfigError(message, param="resume")
