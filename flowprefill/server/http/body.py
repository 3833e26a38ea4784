"""Reading request bodies: bytes to a JSON object, and its fields by type; used by the schemas."""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Any, NoReturn

from flowprefill.errors import InvalidRequest, shortened
from flowprefill.server.http.json_text import MAX_DEPTH, MAX_NUMBERS, parse_json

logger = logging.getLogger(__name__)

MAX_REMEMBERED_FIELDS = 1000
MAX_LOGGED_FIELDS = 20
MAX_NAMED_FIELDS = 5
NAME_CHARS = 80  # of a name that came from the network, in errors and in the log
_MISSING: Any = object()
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class UnknownField(InvalidRequest):
    """A field that the endpoint does not have; to ignore it might change the answer unseen."""

    code = "unknown_parameter"  # OpenAI's


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
        raise InvalidRequest(
            f"body: nested too deeply, expected at most {MAX_DEPTH} objects and lists inside "
            "one another",
            param="body",
        ) from None
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
        self._inner: dict[str, Body] = {}

    @property
    def fields(self) -> Mapping[str, Any]:
        """All of them, unchecked; reading here marks none as known."""
        return self._fields

    def raw(self, name: str, default: Any = None) -> Any:
        """Return the field unchecked, ``default`` if it is missing or null."""
        self._read.add(name)
        value = self._fields.get(name, _MISSING)
        return default if value is _MISSING or value is None else value

    def accept(self, names: Iterable[str]) -> None:
        """Mark fields as known that nothing reads: they change no answer."""
        self._read.update(names)

    def accept_in(self, name: str, members: Iterable[str]) -> None:
        """Mark the members of an object as known whose reader takes it as a whole."""
        value = self._fields.get(name)
        if isinstance(value, dict):
            self._inner[name] = Body(value, f"{self._path}{name}.")
            self._inner[name].accept(members)

    @property
    def known(self) -> AbstractSet[str]:
        """Names that were read or accepted, given or not."""
        return self._read

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
            allowed = " or ".join(["null", *(shortened(one, as_json=True) for one in neutral)])
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
        if name not in self._inner:
            self._inner[name] = Body(value, f"{self._path}{name}.")
        return self._inner[name]

    def unread(self) -> Iterator[str]:
        """Yield the fields of this object that were given, but neither read nor accepted."""
        for name, value in self._fields.items():
            if value is not None and name not in self._read:
                yield name

    def unknown(self) -> Iterator[tuple[str, AbstractSet[str]]]:
        """Yield such fields of this object and of those in it, as NAME or OBJECT.NAME.

        With each comes what the object has instead.
        """
        for name in self.unread():
            yield self._path + name, self._read
        for inner in self._inner.values():
            yield from inner.unknown()

    def refuse_unknown(self, allowed: Collection[str]) -> None:
        """Refuse fields that were never read; for our own objects, where a typo must not pass."""
        for name in self.unread():
            self.refuse(name, self._fields[name], "only " + ", ".join(sorted(allowed)))


def _is_same(value: Any, neutral: Any) -> bool:
    """Compare as JSON does: 1 is 1.0, and true is neither."""
    if isinstance(value, bool) or isinstance(neutral, bool):
        return value is neutral
    if isinstance(value, (int, float)) and isinstance(neutral, (int, float)):
        return value == neutral
    return type(value) is type(neutral) and bool(value == neutral)


def _complaint(path: str, known: Iterable[str]) -> str:
    """Say that there is no such field, and which was probably meant, also by camel case."""
    if len(path) > NAME_CHARS:
        return f"{path[:NAME_CHARS]}...: no such field"
    name = _HUMP.sub("_", path.rpartition(".")[2]).replace("-", "_").lower()
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"{path}: no such field" + (f", did you mean {near[0]}?" if near else "")


class UnknownFields:
    """What becomes of fields that no schema reads: refused, or logged once by name and ignored."""

    def __init__(self, *, refuses: bool) -> None:
        self._refuses = refuses
        self._seen: set[str] = set()

    def check(self, endpoint: str, body: Body) -> None:
        """Look at a body that its schema has read.

        Raises:
            UnknownField: one is given, and such are refused here.
        """
        # Names come from the network: what is told of one body, and remembered, is bounded.
        if self._refuses:
            found = list(islice(body.unknown(), MAX_NAMED_FIELDS))
            if found:
                told = "; ".join(_complaint(path, known) for path, known in found)
                message = f"{told} (a server with --unknown-fields ignore lets such fields pass)"
                raise UnknownField(message, param=found[0][0][:NAME_CHARS])
            return
        fresh = (path for path, _ in body.unknown() if path not in self._seen)
        for path in islice(fresh, MAX_LOGGED_FIELDS):
            if len(self._seen) >= MAX_REMEMBERED_FIELDS:
                return
            self._seen.add(path)
            logger.warning("%s: ignoring unknown field %.80r", endpoint, path)
