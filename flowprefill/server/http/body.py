"""Reading request bodies: bytes to a JSON object, and its fields by type; used by the schemas."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any, NoReturn

from flowprefill.errors import InvalidRequest
from flowprefill.server.http.json_text import MAX_NUMBERS, parse_json

logger = logging.getLogger(__name__)

MAX_REMEMBERED_FIELDS = 1000
MAX_LOGGED_FIELDS = 20
_MISSING: Any = object()


def parse_json_object(raw: bytes, max_model_len: int = 0) -> dict[str, Any]:
    """Parse a request body.

    Args:
        raw: the body.
        max_model_len: a prompt of so many token ids is let through, however long.

    Raises:
        InvalidRequest: not UTF-8, not JSON, nested too deeply, of too many values, or no object.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"body: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8",
            param="body",
        ) from None
    if not text.strip():
        raise InvalidRequest("body: empty, expected a JSON object", param="body")
    try:
        value = parse_json(raw, text, max(MAX_NUMBERS, 2 * max_model_len))
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"body: not JSON at line {error.lineno}, column {error.colno} ({error.msg})",
            param="body",
        ) from None
    except RecursionError:
        raise InvalidRequest("body: nested too deeply", param="body") from None
    except ValueError:  # an integer of thousands of digits
        raise InvalidRequest("body: a number is too long", param="body") from None
    if not isinstance(value, dict):
        raise InvalidRequest.field("body", value, "a JSON object")
    return value


def check_text(param: str, value: Any, allowed: str = "a string") -> str:
    """Return ``value`` if it is text that UTF-8 can carry (no lone surrogates)."""
    if not isinstance(value, str):
        raise InvalidRequest.field(param, value, allowed)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"{param}: character {error.start} is half of a surrogate pair, not valid Unicode",
                param=param,
            ) from None
    return value


def whole_number(value: Any) -> Any:
    """Return a float that is whole as an int, anything else as it is: JSON has one kind of number.

    So 16.0 is an integer, as in JSON Schema; clients whose language has floats only write it so.
    """
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole_ids(ids: list[Any]) -> list[Any]:
    """Return a list of token ids with its whole floats as ints. Cost: a pass in C without any."""
    return [*map(whole_number, ids)] if float in set(map(type, ids)) else ids


class Body:
    """A JSON object whose fields are read by name and type; null counts as not given.

    ``path`` prefixes the names in errors (``slo.`` for the object in the field ``slo``).
    """

    def __init__(self, fields: Mapping[str, Any], path: str = "") -> None:
        self._fields = fields
        self._path = path
        self._read: set[str] = set()

    @property
    def fields(self) -> Mapping[str, Any]:
        """All of them, unchecked; reading here marks none as known."""
        return self._fields

    def raw(self, name: str, default: Any = None) -> Any:
        """Return the field unchecked, ``default`` if it is missing or null."""
        self._read.add(name)
        value = self._fields.get(name, _MISSING)
        return default if value is _MISSING or value is None else value

    def refuse(self, name: str, value: Any, allowed: str) -> NoReturn:
        """Raise the error for one field."""
        raise InvalidRequest.field(self._path + name, value, allowed)

    def only_neutral(
        self,
        table: Mapping[str, tuple[Any, ...]],
        why: str = "this field is not supported",
    ) -> None:
        """Refuse the fields of a table that are given with another than a neutral value.

        Args:
            table: field -> its neutral values besides null: what it is where it is left out.
            why: the end of the error, which names the field and its neutral values.
        """
        for name in [name for name in table if name in self._fields]:
            value, neutral = self.raw(name), table[name]
            if value is None or any(_is_same(value, one) for one in neutral):
                continue
            allowed = " or ".join(["null", *(repr(one) for one in neutral)])
            self.refuse(name, value, f"{allowed}: {why}")

    def text(self, name: str, default: str | None = None) -> str | None:
        """Read a string."""
        value = self.raw(name)
        return default if value is None else check_text(self._path + name, value)

    def boolean(self, name: str, default: bool = False) -> bool:
        """Read true or false; 0, 1 and "true" are refused."""
        value = self.raw(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return value

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        """Read an integer in [low, high]; 5.0 is one, 5.5 and "5" are refused."""
        value = whole_number(self.raw(name))
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, value, f"an integer in [{low}, {high}]")
        return value

    def number(self, name: str, default: Any, low: float, high: float, *, open_low: bool) -> Any:
        """Read a finite number in [low, high], or in (low, high]."""
        value = self.raw(name)
        if value is None:
            return default
        allowed = f"a number in {'(' if open_low else '['}{low:.10g}, {high:.10g}]"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(name, value, allowed)
        # An int too large for a float compares fine but cannot be tested for being finite.
        if isinstance(value, float) and not math.isfinite(value):
            self.refuse(name, value, allowed)
        if not low <= value <= high or (open_low and value == low):
            self.refuse(name, value, allowed)
        return value

    def listed(self, name: str, most: int, of: str) -> list[Any]:
        """Read a list, empty by default; its length is checked before its items are read.

        Args:
            name: the field.
            most: items it may have.
            of: what they are, for the error, e.g. ``"token ids"``.
        """
        value = self.raw(name, [])
        if not isinstance(value, list) or len(value) > most:
            self.refuse(name, value, f"a list of at most {most} {of}")
        return value

    def object(self, name: str) -> Body | None:
        """Read a nested object; its errors are named ``name.field``."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, value, "an object")
        return Body(value, f"{self._path}{name}.")

    def unknown(self) -> list[str]:
        """Return the names of fields that were given and never read."""
        return [name for name in self._fields if name not in self._read]

    def refuse_unknown(self, allowed: Collection[str]) -> None:
        """Refuse fields that were never read; for our own objects, where a typo must not pass."""
        for name in self.unknown():
            self.refuse(name, self._fields[name], "only " + ", ".join(sorted(allowed)))


def _is_same(value: Any, neutral: Any) -> bool:
    """Compare as JSON does: 1 is 1.0, and true is neither."""
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    if isinstance(value, (int, float)) and isinstance(neutral, (int, float)):
        return value == neutral
    return type(value) is type(neutral) and bool(value == neutral)


class UnknownFields:
    """Warns once per unknown field name, so that clients with extra fields work and typos show."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def warn(self, endpoint: str, body: Body) -> None:
        """Log every field of ``body`` that no schema read and that was not logged before."""
        fresh = (name for name in body.unknown() if name not in self._seen)
        # Names come from the network: what is logged for one body and remembered is bounded.
        for name in islice(fresh, MAX_LOGGED_FIELDS):
            if len(self._seen) >= MAX_REMEMBERED_FIELDS:
                return
            self._seen.add(name)
            logger.warning("%s: ignoring unknown field %.80r", endpoint, name)
