"""ToolCalls: finds tool calls in generated text, in the formats that models were trained on.

One machine reads them all; what differs is in CallFormat: which mark opens the calls, which closes
each, and what may stand between them. What turns out to be no call of a known tool stays content.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from dataclasses import dataclass

from flowprefill.server.openai.call_object import CallObject
from flowprefill.server.openai.message import CallPart, MessagePart, partial_mark


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a family of models writes tool calls.

    Attributes:
        name: as ``--tool-call-parser`` names it.
        opening: the mark before calls; empty for none.
        closing: the mark after each; empty for none.
        is_bare: a text that starts with a brace is a call without the mark.
        between: characters that may stand between two calls.
        arguments_mark: what parts a name that stands before its arguments' object from it; empty:
            the name is inside of the object.
        argument_key: the member for the arguments, in calls that we write or enforce.
        id_chars: length of the calls' ids; 0 is ours.
    """

    name: str
    opening: str = ""
    closing: str = ""
    is_bare: bool = False
    between: str = " \t\r\n"
    arguments_mark: str = ""
    argument_key: str = "arguments"
    id_chars: int = 0


FORMATS = {
    known.name: known
    for known in (
        CallFormat("hermes", "<tool_call>", "</tool_call>"),
        CallFormat(
            "llama3", "<|python_tag|>", is_bare=True, between=" \t\r\n;", argument_key="parameters"
        ),
        CallFormat(
            "mistral", "[TOOL_CALLS]", between=" \t\r\n[],", arguments_mark="[ARGS]", id_chars=9
        ),
        CallFormat("json", is_bare=True, between=" \t\r\n[],;"),
    )
}
TOOL_PARSERS = ("auto", *FORMATS)


def call_format_of(setting: str, template: str) -> CallFormat:
    """Return the format of the setting; ``auto`` looks for the marks in the chat template."""
    if setting != "auto":
        return FORMATS[setting]
    for known in FORMATS.values():
        if known.opening and known.opening in template:
            return known
    is_llama = "ipython" in template and '"parameters"' in template
    return FORMATS["llama3" if is_llama else "json"]


class ToolCalls:
    """Reads one choice's text; see MessageParser."""

    def __init__(self, form: CallFormat, names: Collection[str], max_calls: int) -> None:
        """Start.

        Args:
            form: how the model writes calls.
            names: of the tools there are.
            max_calls: calls beyond it are dropped.
        """
        self._form = form
        self._names = names
        self._max_calls = max_calls
        self._buffer = ""
        self._state = "text"
        self._raw = ""  # text of the state that is content if no call comes of it
        self._call: CallObject | None = None
        self._is_named = False  # the current call's name was given
        self._count = 0
        self._is_start = True

    is_thinking = None

    @property
    def has_calls(self) -> bool:
        """Whether a call was found so far."""
        return self._count > 0

    def push(self, text: str) -> MessagePart:
        """Take the next text."""
        self._buffer += text
        part = MessagePart()
        while self._buffer:
            before = (self._state, len(self._buffer))
            part.add(getattr(self, f"_read_{self._state}")())
            if before == (self._state, len(self._buffer)):
                break
        return part

    def finish(self) -> MessagePart:
        """Take the end: what was held back and is no call is content."""
        rest = self._buffer
        if self._state != "text" and not self._is_named:
            rest = self._raw + rest
            if self._count and not rest.strip(self._form.between):
                rest = ""
        elif self._state == "call":
            rest = ""
        self._buffer = self._raw = ""
        return MessagePart(rest)

    def _read_text(self) -> MessagePart:
        form, text = self._form, self._buffer
        if self._is_start and form.is_bare:
            start = text.lstrip()
            if not start:
                return MessagePart()
            if start[0] in "{[":
                self._state = "between"
                return MessagePart()
        if not form.opening:
            self._is_start, self._buffer = False, ""
            return MessagePart(text)
        content, mark, rest = text.partition(form.opening)
        if mark:
            self._buffer, self._state, self._raw = rest, "between", mark
            return self._content(content.rstrip())
        shown = text[: len(text) - partial_mark(text, form.opening)].rstrip()
        self._buffer = text[len(shown) :]
        return self._content(shown)

    def _content(self, text: str) -> MessagePart:
        self._is_start = self._is_start and not text
        return MessagePart(text)

    def _read_between(self) -> MessagePart:
        form, rest = self._form, self._buffer
        while rest:
            marks = [mark for mark in (form.closing, form.opening) if mark]
            found = next((mark for mark in marks if rest.startswith(mark)), None)
            if found is not None:
                self._skip(rest[len(found) :])
                if found == form.closing:
                    self._raw, self._state = "", "text"
                return MessagePart()
            if any(mark.startswith(rest) for mark in marks):
                self._skip(rest)
                return MessagePart()  # more of the mark may come
            if rest[0] not in form.between:
                break
            rest = rest[1:]
        self._skip(rest)
        if not rest:
            return MessagePart()
        if rest[0] == "{":
            self._begin_call(CallObject())
        elif form.arguments_mark and (rest[0].isalnum() or rest[0] == "_"):
            self._state = "name"
        else:
            return self._give_up()
        return MessagePart()

    def _skip(self, rest: str) -> None:
        """Go on with the rest of the buffer; what is before it may turn out to be content."""
        self._raw += self._buffer[: len(self._buffer) - len(rest)]
        self._buffer = rest

    def _read_name(self) -> MessagePart:
        """Read the name that stands before its arguments."""
        end = self._buffer.find("{")
        if end < 0:
            return MessagePart()
        name = self._buffer[:end].removesuffix(self._form.arguments_mark).strip()
        self._raw += self._buffer[:end]
        self._buffer = self._buffer[end:]
        self._begin_call(CallObject(name))
        return MessagePart()

    def _begin_call(self, call: CallObject) -> None:
        self._call, self._is_named, self._state = call, False, "call"

    def _read_call(self) -> MessagePart:
        call = self._call
        assert call is not None
        taken = call.push(self._buffer)
        self._raw += self._buffer[:taken]
        self._buffer = self._buffer[taken:]
        part = MessagePart()
        if not self._is_named and call.name is not None and call.name in self._names:
            self._is_named = True
            self._count += 1
            self._give(part, CallPart(self._count - 1, self._new_id(), call.name))
        if self._is_named:
            arguments = call.take_arguments()
            if arguments:
                self._give(part, CallPart(self._count - 1, arguments=arguments))
        if call.is_complete:
            if not self._is_named:
                part.add(self._give_up())
                return part
            self._raw, self._is_named, self._state = "", False, "between"
        return part

    def _give(self, part: MessagePart, call: CallPart) -> None:
        if call.index < self._max_calls:
            part.add(MessagePart(calls=[call]))

    def _give_up(self) -> MessagePart:
        """What was read since the mark is no call: it is content."""
        text, self._raw, self._state = self._raw, "", "text"
        self._is_start = False
        if not self._form.opening or not self._buffer:
            text, self._buffer = text + self._buffer, ""
        return MessagePart(text)

    def _new_id(self) -> str:
        made = uuid.uuid4().hex
        return made[: self._form.id_chars] if self._form.id_chars else f"call_{made[:24]}"
