"""parse_json: request bodies to Python values at a bounded cost; called by body.py.

The json module's parser in C holds the GIL from the first byte to the last, so a body of a million
small values would stop the event loop and every stream for half a second, also from a thread. A
look at the body tells how many values it can have at most. With few it goes to the parser in C;
with many, to the module's parser in Python, which other threads can interrupt and which stops at
the first value too many.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from json import scanner
from json.decoder import JSONArray, JSONObject, scanstring  # type: ignore[attr-defined]
from typing import Any, NoReturn

from flowprefill.errors import InvalidRequest

# Up to these the parser in C takes about 20 ms at most: objects, lists and texts are dearest, then
# floats, each of which is looked at. Integers cost the square of their digits, so a body of more
# digits a value is none of the few.
FEW_PARTS, FEW_FLOATS, FEW_VALUES, FEW_DIGITS = 20_000, 50_000, 250_000, 20
# 10,000 messages of several parts fit, and the token ids of 30 prompts of 10,000.
MAX_PARTS, MAX_NUMBERS, MAX_DIGITS = 100_000, 300_000, 400
# Objects and lists inside one another. What copies and writes a value later takes several frames of
# Python's stack, of which there are 1000, for each.
MAX_DEPTH = 128


def parse_json(raw: bytes, text: str, max_numbers: int = MAX_NUMBERS) -> Any:
    """Parse a body given as bytes and as text.

    Raises:
        InvalidRequest: NaN, an infinity or what is too large for a float, more than MAX_PARTS
            objects, lists and texts, or more than ``max_numbers`` numbers.
        ValueError: as json.loads; or an integer of more than MAX_DIGITS digits.
        RecursionError: it is more than MAX_DEPTH deep.
    """
    containers = raw.count(b"[") + raw.count(b"{")
    parts = containers + raw.count(b'"') // 2
    values = containers + raw.count(b",") + 1
    floats = min(sum(map(raw.count, (b".", b"e", b"E"))), values)
    if parts <= FEW_PARTS and floats <= FEW_FLOATS and values <= FEW_VALUES:
        digits = len(raw) - len(raw.translate(None, b"0123456789"))
        is_small = digits <= FEW_DIGITS * values + MAX_DIGITS
    else:
        is_small = False
    if is_small:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    else:
        value = _CountingDecoder(max_numbers).decode(text)
    if containers > MAX_DEPTH:
        check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise RecursionError for a parsed value that is more than MAX_DEPTH deep."""
    level, depth = [value], 0  # the objects and lists that are so deep
    while level := [one for one in level if type(one) in (dict, list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise RecursionError(f"more than {MAX_DEPTH} objects and lists inside one another")
        level = [inner for one in level for inner in (one.values() if type(one) is dict else one)]


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"body: {name} is not JSON; numbers must be finite", param="body")


def _finite(text: str) -> float:
    """Read a float; Python takes 1e999 for an infinity, which no reply could repeat as JSON."""
    value = float(text)
    if math.isinf(value):
        raise InvalidRequest(f"body: {text[:20]} is larger than any number", param="body")
    return value


class _CountingDecoder(json.JSONDecoder):
    """Stops at the first value too many; texts are still read in C."""

    def __init__(self, max_numbers: int) -> None:
        super().__init__(
            parse_constant=_refuse_constant, parse_int=self._int, parse_float=self._float
        )
        self._parts = self._numbers = 0
        self._max_numbers = max_numbers
        self.parse_object = self._object
        self.parse_array = self._array
        self.parse_string = self._string
        self.memo = _Keys(self._count_part)
        self.scan_once = scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _count_part(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(
                f"body: got more than {MAX_PARTS} objects, lists and texts, expected at most that",
                param="body",
            )

    def _count_number(self) -> None:
        self._numbers += 1
        if self._numbers > self._max_numbers:
            raise InvalidRequest(
                f"body: got more than {self._max_numbers} numbers, expected at most that",
                param="body",
            )

    def _object(self, *arguments: Any) -> Any:
        self._count_part()
        return JSONObject(*arguments)

    def _array(self, *arguments: Any) -> Any:
        self._count_part()
        return JSONArray(*arguments)

    def _string(self, *arguments: Any) -> Any:
        self._count_part()
        return scanstring(*arguments)

    def _int(self, text: str) -> int:
        self._count_number()
        if len(text) > MAX_DIGITS:
            raise ValueError("a number is too long")
        return int(text)

    def _float(self, text: str) -> float:
        self._count_number()
        return _finite(text)


class _Keys(dict[str, str]):
    """Where the decoder looks every key of an object up: so they can be counted."""

    def __init__(self, count: Callable[[], None]) -> None:
        super().__init__()
        self._count = count

    def setdefault(self, key: str, default: str) -> str:
        self._count()
        return super().setdefault(key, default)
