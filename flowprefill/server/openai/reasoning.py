"""Thinking: parts a model's reasoning from its answer; around the parser of the answer."""

from __future__ import annotations

from flowprefill.server.openai.message import MessageParser, MessagePart, partial_mark

REASONING_PARSERS = ("auto", "none", "think")
OPEN, CLOSE = "<think>", "</think>"


def reasoning_parser_of(setting: str, template: str) -> str:
    """Return ``think`` or ``none``; ``auto`` looks whether the chat template knows the mark."""
    if setting != "auto":
        return setting
    return "think" if CLOSE in template else "none"


class Thinking:
    """Text up to ``</think>`` is reasoning, if it starts with ``<think>`` or the prompt did."""

    def __init__(self, answer: MessageParser, *, is_open: bool, is_shown: bool) -> None:
        """Start.

        Args:
            answer: reads what follows the reasoning.
            is_open: the prompt ends inside of the reasoning.
            is_shown: give the reasoning; else it is dropped.
        """
        self._answer = answer
        self._is_shown = is_shown
        self._state = "inside" if is_open else "before"
        self._held = ""
        self._is_fresh = True  # white space is dropped: nothing was shown of this part yet

    @property
    def has_calls(self) -> bool:
        """Whether the answer has tool calls so far."""
        return self._answer.has_calls

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends inside of the reasoning."""
        return self._state == "inside"

    def push(self, text: str) -> MessagePart:
        """Take the next text."""
        if self._state == "after":
            return self._push_answer(text)
        self._held += text
        if self._state == "before":
            start = self._held.lstrip()
            if start.startswith(OPEN):
                self._state, self._held = "inside", start[len(OPEN) :]
            elif OPEN.startswith(start):
                return MessagePart()
            else:
                held, self._held, self._state = self._held, "", "after"
                self._is_fresh = False
                return self._answer.push(held)
        return self._push_inside()

    def _push_inside(self) -> MessagePart:
        reasoning, mark, rest = self._held.partition(CLOSE)
        if mark:
            self._held, self._state = "", "after"
            part = self._reasoning(reasoning.rstrip())
            self._is_fresh = True
            part.add(self._push_answer(rest))
            return part
        keep = partial_mark(self._held, CLOSE)
        shown = self._held[: len(self._held) - keep].rstrip()
        self._held = self._held[len(shown) :]
        return self._reasoning(shown)

    def _reasoning(self, text: str) -> MessagePart:
        if self._is_fresh:
            text = text.lstrip()
            self._is_fresh = not text
        return MessagePart(reasoning=text if self._is_shown else "")

    def _push_answer(self, text: str) -> MessagePart:
        if self._is_fresh:
            text = text.lstrip()
            self._is_fresh = not text
        return self._answer.push(text)

    def finish(self) -> MessagePart:
        """Take the end."""
        held, self._held = self._held, ""
        if self._state == "inside":
            part = self._reasoning(held)
        else:
            part = self._answer.push(held) if held else MessagePart()
        part.add(self._answer.finish())
        return part
