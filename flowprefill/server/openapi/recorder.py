"""FieldRecorder: a Body that notes which fields a reader reads, with type, range and default.

request_schemas.py runs the server's own readers on it, so that no field is declared twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from flowprefill.request import SAMPLING_RANGES
from flowprefill.server.http.body import Body

Schema = dict[str, Any]


@dataclass
class Found:
    """What readers have read of one object.

    Attributes:
        schemas: field -> its JSON schema as far as the way of reading tells it.
        refused: field -> the values besides null that are not refused.
        inner: field that is an object -> what was read of it.
        is_closed: whether other fields are refused.
    """

    schemas: dict[str, Schema] = field(default_factory=dict)
    refused: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    inner: dict[str, Found] = field(default_factory=dict)
    is_closed: bool = False

    def note(self, name: str, schema: Schema, default: Any = None) -> None:
        """Note a field; what is known of it already stays."""
        if default is not None and not isinstance(default, (list, dict)):
            schema = {**schema, "default": default}
        self.schemas[name] = {**schema, **self.schemas.get(name, {})}


class FieldRecorder(Body):
    """Reads as a Body does; readers that stop at an error have told nothing of the rest."""

    def __init__(
        self, fields: Mapping[str, Any], path: str = "", found: Found | None = None
    ) -> None:
        super().__init__(fields, path)
        self.found = Found() if found is None else found

    def raw(self, name: str, default: Any = None) -> Any:
        """Note a field whose reader checks it, or SamplingParams if it is one of its numbers."""
        range_ = SAMPLING_RANGES.get(name)
        schema: Schema = {}
        if range_ is not None and not self._path:
            kind = "integer" if range_.is_whole else "number"
            low = "exclusiveMinimum" if range_.open_low else "minimum"
            schema = {"type": kind, low: range_.low, "maximum": range_.high}
        if name not in self.found.schemas:
            self.found.note(name, schema, default)
        return super().raw(name, default)

    def only_neutral(
        self,
        table: Mapping[str, tuple[Any, ...]],
        why: str = "this field is not supported",
    ) -> None:
        """Note fields that are refused."""
        self.found.refused.update(table)
        before = dict(self.found.schemas)
        super().only_neutral(table, why)
        self.found.schemas = before

    def text(self, name: str, default: str | None = None) -> str | None:
        """Note a string."""
        self.found.note(name, {"type": "string"}, default)
        return super().text(name, default)

    def boolean(self, name: str, default: bool = False) -> bool:
        """Note true or false."""
        self.found.note(name, {"type": "boolean"}, default)
        return super().boolean(name, default)

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        """Note an integer and its range."""
        self.found.note(name, {"type": "integer", "minimum": low, "maximum": high}, default)
        return super().integer(name, default, low, high)

    def number(self, name: str, default: Any, low: float, high: float, *, open_low: bool) -> Any:
        """Note a number and its range."""
        least = "exclusiveMinimum" if open_low else "minimum"
        self.found.note(name, {"type": "number", least: low, "maximum": high}, default)
        return super().number(name, default, low, high, open_low=open_low)

    def listed(self, name: str, most: int, of: str) -> list[Any]:
        """Note a list and its length."""
        self.found.note(name, {"type": "array", "maxItems": most})
        return super().listed(name, most, of)

    def object(self, name: str) -> Body | None:
        """Note an object, and what is read of it."""
        self.found.note(name, {"type": "object"})
        if super().object(name) is None:
            return None
        inner = self.found.inner.setdefault(name, Found())
        return FieldRecorder(self._fields[name], f"{self._path}{name}.", inner)

    def refuse_unknown(self, allowed: Collection[str]) -> None:
        """Note that the object has no other fields."""
        self.found.is_closed = True
        super().refuse_unknown(allowed)
