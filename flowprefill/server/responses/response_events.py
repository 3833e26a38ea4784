"""Output items of /v1/responses and the events by which a stream builds them; for responses.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowprefill.request import Token
from flowprefill.server.openai.endpoint import Generation
from flowprefill.server.openai.message import CallPart, MessagePart, push_token

Event = dict[str, Any]


def output_items(response_id: str, whole: MessagePart, status: str) -> list[dict[str, Any]]:
    """Return a whole message's output items: reasoning, text, calls; the last has the status."""
    suffix = response_id.partition("_")[2]
    items = []
    if whole.reasoning:
        items.append(_reasoning_item(f"rs_{suffix}", whole.reasoning))
    if whole.content or not whole.calls:
        items.append(_message_item(f"msg_{suffix}", whole.content, "completed"))
    items += [_call_item(f"fc_{suffix}_{call.index}", call, "completed") for call in whole.calls]
    items[-1]["status"] = status  # where it was cut; a text or a call, if there is reasoning too
    return items


def _reasoning_item(item_id: str, text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"type": "reasoning", "id": item_id, "summary": [], "content": content}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message_item(item_id: str, text: str, status: str) -> dict[str, Any]:
    content = [] if status == "in_progress" else [_text_part(text)]
    return {
        "type": "message", "id": item_id, "status": status, "role": "assistant", "content": content,
    }  # fmt: skip


def _call_item(item_id: str, call: CallPart, status: str) -> dict[str, Any]:
    return {
        "type": "function_call", "id": item_id, "status": status, "call_id": call.id,
        "name": call.name, "arguments": call.arguments,
    }  # fmt: skip


class ResponseWriter:
    """Writes one response's stream; see EventWriter.

    One output item is open at a time: the next one closes it.
    """

    def __init__(
        self,
        generation: Generation,
        payload: Callable[[Generation, str, list[dict[str, Any]]], dict[str, Any]],
        ended: Callable[..., dict[str, Any]],
    ) -> None:
        """Start.

        Args:
            payload: returns the response object as it stands.
            ended: returns the whole one.
        """
        self._generation = generation
        self._payload, self._ended = payload, ended
        self._parser = generation.order.parser()
        self._suffix = generation.envelope.id.partition("_")[2]
        self._whole = MessagePart()
        self._items: list[dict[str, Any]] = []
        self._open = ""  # kind of the open item
        self._text = ""  # of it
        self._call = CallPart(0)
        self._number = 0
        self._tokens = self._reasoning_tokens = 0
        self._finish_reason: str | None = None

    def events_of(self, index: int, token: Token) -> list[Event]:  # noqa: ARG002 - only one choice
        """Return what the next token brings."""
        events = self._begin() if self._tokens == 0 else []
        self._tokens += 1
        part, is_reasoning = push_token(self._parser, token)
        self._reasoning_tokens += is_reasoning
        if token.finish_reason is not None:
            self._finish_reason = token.finish_reason
            part.add(self._parser.finish())
        self._whole.add(_copied(part))
        if part.reasoning:
            events += self._add("reasoning", part.reasoning)
        if part.content:
            events += self._add("message", part.content)
        for call in part.calls:
            events += self._add_call(call)
        return events

    def ending_events(self, index: int) -> list[Event]:  # noqa: ARG002 - it has had a token
        """Return none: the last token brought all."""
        return []

    def closing_events(self) -> list[Event]:
        """Return the ends of the open item and of the response."""
        events = [] if self._items or self._open else self._add("message", "")
        events += self._close("incomplete" if self._finish_reason == "length" else "completed")
        response = self._ended(
            self._generation, self._whole, self._items, self._finish_reason, self._tokens,
            self._reasoning_tokens,
        )  # fmt: skip
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _begin(self) -> list[Event]:
        response = self._payload(self._generation, "in_progress", [])
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=response) for kind in kinds]

    @property
    def _where(self) -> dict[str, Any]:
        """How events name the open item."""
        prefix = {"reasoning": "rs", "message": "msg", "call": "fc"}[self._open]
        count = f"_{len(self._items)}" if self._items else ""
        return {"item_id": f"{prefix}_{self._suffix}{count}", "output_index": len(self._items)}

    def _begin_item(self, kind: str) -> list[Event]:
        events = self._close()
        self._open, self._text = kind, ""
        item = self._item("in_progress")
        added = self._event("response.output_item.added", output_index=len(self._items), item=item)
        if kind != "message":
            return [*events, added]
        part = {"content_index": 0, "part": _text_part("")}
        return [*events, added, self._event("response.content_part.added", **self._where, **part)]

    def _item(self, status: str) -> dict[str, Any]:
        item_id = self._where["item_id"]
        if self._open == "reasoning":
            return _reasoning_item(item_id, self._text)
        if self._open == "message":
            return _message_item(item_id, self._text, status)
        call = CallPart(0, self._call.id, self._call.name, self._text)
        return _call_item(item_id, call, status)

    def _add(self, kind: str, text: str) -> list[Event]:
        events = [] if self._open == kind else self._begin_item(kind)
        self._text += text
        name = "output_text" if kind == "message" else "reasoning_text"
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        if text:
            events.append(self._event(
                f"response.{name}.delta", **self._where, content_index=0, delta=text, **extra,
            ))  # fmt: skip
        return events

    def _add_call(self, call: CallPart) -> list[Event]:
        events = []
        if call.id is not None:
            events = self._close()
            self._call = call
            events += self._begin_item("call")
        if call.arguments:
            self._text += call.arguments
            kind = "response.function_call_arguments.delta"
            events.append(self._event(kind, **self._where, delta=call.arguments))
        return events

    def _close(self, status: str = "completed") -> list[Event]:
        """End the open item, if there is one."""
        if not self._open:
            return []
        where, item = self._where, self._item(status)
        events = []
        if self._open == "message":
            part = _text_part(self._text)
            events = [
                self._event("response.output_text.done", **where, content_index=0,
                            text=self._text, logprobs=[]),
                self._event("response.content_part.done", **where, content_index=0, part=part),
            ]  # fmt: skip
        elif self._open == "reasoning":
            events = [self._event("response.reasoning_text.done", **where, content_index=0,
                                  text=self._text)]  # fmt: skip
        else:
            events = [self._event("response.function_call_arguments.done", **where,
                                  name=self._call.name, arguments=self._text)]  # fmt: skip
        events.append(self._event(
            "response.output_item.done", output_index=where["output_index"], item=item
        ))  # fmt: skip
        self._items.append(item)
        self._open = ""
        return events


def _copied(part: MessagePart) -> MessagePart:
    """Return a copy whose calls may grow."""
    calls = [CallPart(c.index, c.id, c.name, c.arguments) for c in part.calls]
    return MessagePart(part.content, part.reasoning, calls)
