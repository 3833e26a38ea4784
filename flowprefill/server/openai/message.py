"""What a generated text becomes in a reply: content, reasoning and tool calls, whole or in parts.

Parsers (reasoning.py, tool_parsers.py) turn text into it; chat.py writes it into replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flowprefill.request import Token


@dataclass(slots=True)
class CallPart:
    """A tool call, or what comes next of one.

    Attributes:
        index: which of the message's calls.
        id, name: given with a call's first part, None in the others.
        arguments: JSON text.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class MessagePart:
    """A message, or what comes next of one."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show yet."""
        return not (self.content or self.reasoning or self.calls)

    def add(self, part: MessagePart) -> None:
        """Append what comes next; parts of one call become one."""
        self.content += part.content
        self.reasoning += part.reasoning
        for call in part.calls:
            if self.calls and self.calls[-1].index == call.index:
                self.calls[-1].arguments += call.arguments
            else:
                self.calls.append(call)


class MessageParser(Protocol):
    """Reads one choice's text as it grows; one thread at a time."""

    @property
    def has_calls(self) -> bool:
        """Whether a tool call was found so far."""
        ...

    @property
    def is_thinking(self) -> bool | None:
        """Whether the text so far ends inside of reasoning; None where there is never any."""
        ...

    def push(self, text: str) -> MessagePart:
        """Take the next text; returns what became certain with it."""
        ...

    def finish(self) -> MessagePart:
        """Take the end of the text; returns what was held back."""
        ...


class PlainText:
    """Text is content."""

    has_calls = False
    is_thinking = None

    def push(self, text: str) -> MessagePart:
        """Return the text."""
        return MessagePart(text)

    def finish(self) -> MessagePart:
        """Return nothing: nothing was held back."""
        return MessagePart()


def push_token(parser: MessageParser, token: Token) -> tuple[MessagePart, bool]:
    """Take the next token's text; returns what became certain, and whether it was reasoning."""
    was_thinking = parser.is_thinking
    part = parser.push(token.text)
    return part, bool(was_thinking or parser.is_thinking)


def read_whole(
    parser: MessageParser, text: str, tokens: Sequence[Token]
) -> tuple[MessagePart, int | None]:
    """Read a whole text, given its tokens too.

    Returns:
        The message, and how many tokens are reasoning; None where there is never any.
    """
    if parser.is_thinking is None:
        part, count = parser.push(text), None
    else:
        part, count = MessagePart(), 0
        for token in tokens:
            more, is_reasoning = push_token(parser, token)
            part.add(more)
            count += is_reasoning
    part.add(parser.finish())
    return part, count


def partial_mark(text: str, mark: str) -> int:
    """Return how many characters at the end of a text may be the start of a mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
