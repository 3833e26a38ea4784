"""CallObject: reads the JSON object of one tool call while it is generated; for tool_parsers.py."""

from __future__ import annotations

import json

NAME_KEYS = ("name", "function")
ARGUMENT_KEYS = ("arguments", "parameters")


class CallObject:
    """The text of ``{"name": …, "arguments": {…}}``, in any order, as far as it has come.

    Attributes:
        text: all that was read.
        is_complete: the object has ended.
        name: once it is known and a text.
    """

    def __init__(self, name: str | None = None) -> None:
        """Start before the opening brace, or, with a name, before that of its arguments."""
        self.text = ""
        self.is_complete = False
        self.name = name
        self._is_bare = name is not None  # only the arguments' object comes
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._string_start = 0
        self._key: str | None = None
        self._value_start: int | None = None
        self._arguments = ""
        self._arguments_start: int | None = None
        self._given = 0  # characters of the arguments that were taken

    def push(self, text: str) -> int:
        """Take the next text; returns how many characters belong to the object."""
        start = len(self.text)
        self.text += text
        for position, char in enumerate(text, start):
            self._take(char, position)
            if self.is_complete:
                self.text = self.text[: position + 1]
                return position + 1 - start
        return len(text)

    def take_arguments(self) -> str:
        """Return what has come of the arguments since the last call."""
        if self._arguments_start is not None:
            self._arguments = self.text[self._arguments_start :]
        elif self.is_complete and not self._arguments:
            self._arguments = "{}"
        new = self._arguments[self._given :]
        self._given = len(self._arguments)
        return new

    def _take(self, char: str, position: int) -> None:
        if self._in_string:
            self._take_in_string(char, position)
        elif char == '"':
            self._in_string, self._string_start = True, position
            self._note_value(char, position)
        elif char in "{[":
            self._note_value(char, position)
            self._depth += 1
        elif char in "}]":
            self._close(position)
        elif self._depth == 1 and not self._is_bare and char == ":":
            self._value_start = -1  # it begins with the next character that is no space
        elif self._depth == 1 and not self._is_bare and char == ",":
            self._end_value(position)
        elif not char.isspace():
            self._note_value(char, position)

    def _take_in_string(self, char: str, position: int) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False
            if self._depth == 1 and not self._is_bare and self._value_start is None:
                self._key = _text_of(self.text[self._string_start : position + 1])

    def _note_value(self, char: str, position: int) -> None:
        """Remember where a member's value begins; the arguments are given as they come."""
        if self._is_bare:
            if self._depth == 0:
                self._arguments_start = position
        elif self._depth == 1 and self._value_start == -1:
            self._value_start = position
            if self._key in ARGUMENT_KEYS and char == "{":
                self._arguments_start = position

    def _close(self, position: int) -> None:
        if self._depth == 1 and not self._is_bare:
            self._end_value(position)
        self._depth -= 1
        if self._depth == 1 and self._arguments_start is not None and not self._is_bare:
            self._arguments = self.text[self._arguments_start : position + 1]
            self._arguments_start = None
        if self._depth <= 0:
            if self._arguments_start is not None:
                self._arguments = self.text[self._arguments_start : position + 1]
                self._arguments_start = None
            self.is_complete = True

    def _end_value(self, position: int) -> None:
        """A member has ended: take the name, and arguments that are no object."""
        if self._value_start is not None and self._value_start >= 0:
            value = self.text[self._value_start : position].strip()
            if self._key in NAME_KEYS and self.name is None:
                self.name = _text_of(value)
            elif self._key in ARGUMENT_KEYS and not value.startswith("{"):
                # Some models write the object as a text, or null for none.
                self._arguments = "{}" if value == "null" else (_text_of(value) or value)
        self._key = self._value_start = None


def _text_of(value: str) -> str | None:
    try:
        text = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return text if isinstance(text, str) else None
