"""ResponseStore: the last replies of /v1/responses, each with the chat that it ends."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

from flowprefill.errors import InvalidRequest

MAX_CHARS = 64 << 20  # of all chats together
MESSAGE_CHARS = 200  # what a message counts in addition to its texts


class ResponseNotFound(InvalidRequest):
    """No such reply is kept (any more)."""

    status = 404
    code = "previous_response_not_found"


class UnknownResponse(InvalidRequest):
    """No reply of that id is kept (any more)."""

    status = 404
    code = "response_not_found"


class Kept(NamedTuple):
    """A reply and the chat that it ends; about how many characters they hold."""

    messages: list[dict[str, Any]]
    reply: dict[str, Any]
    chars: int


class ResponseStore:
    """Replies and their chats by the reply's id; the oldest go first. Any thread."""

    def __init__(self, max_responses: int, max_chars: int = MAX_CHARS) -> None:
        """Keep so many replies, of so many characters together, their chats included."""
        self._lock = threading.Lock()
        self._max_responses = max_responses
        self._max_chars = max_chars
        self._chars = 0
        self._kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()

    def put(self, messages: list[dict[str, Any]], reply: dict[str, Any], tenant: str = "") -> None:
        """Keep a tenant's reply and its chat; nothing may change either afterwards."""
        kept = Kept(messages, reply, _chars(messages) + _chars(reply))
        with self._lock:
            self._kept[tenant, reply["id"]] = kept
            self._chars += kept.chars
            while len(self._kept) > self._max_responses or self._chars > self._max_chars:
                self._chars -= self._kept.popitem(last=False)[1].chars

    def get(self, response_id: str, tenant: str = "") -> list[dict[str, Any]]:
        """Return the messages of a tenant's chat; raises ResponseNotFound."""
        with self._lock:
            found = self._kept.get((tenant, response_id))
        if found is None:
            raise ResponseNotFound(
                f"previous_response_id: {response_id[:80]!r} is not kept here (any more)",
                param="previous_response_id",
            )
        return found.messages

    def reply(self, response_id: str, tenant: str = "") -> dict[str, Any]:
        """Return a tenant's reply as it was sent; raises UnknownResponse."""
        with self._lock:
            found = self._kept.get((tenant, response_id))
        if found is None:
            raise _unknown(response_id)
        return found.reply

    def remove(self, response_id: str, tenant: str = "") -> None:
        """Forget a tenant's reply and its chat; raises UnknownResponse."""
        with self._lock:
            found = self._kept.pop((tenant, response_id), None)
            if found is None:
                raise _unknown(response_id)
            self._chars -= found.chars


def _unknown(response_id: str) -> UnknownResponse:
    return UnknownResponse(f"id: {response_id[:80]!r} is not kept here (any more)", param="id")


def _chars(value: Any) -> int:
    """Return about how many characters a chat, or a part of one, holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return MESSAGE_CHARS + sum(map(_chars, value.values()))
    return sum(map(_chars, value)) if isinstance(value, list) else 0
