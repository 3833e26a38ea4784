"""ResponseStore: the chats behind the last replies of /v1/responses, for previous_response_id."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from flowprefill.errors import InvalidRequest

MAX_CHARS = 64 << 20  # of all chats together
MESSAGE_CHARS = 200  # what a message counts in addition to its texts


class ResponseNotFound(InvalidRequest):
    """No such reply is kept (any more)."""

    status = 404
    code = "previous_response_not_found"


class ResponseStore:
    """Chats by the id of the reply that ends them; the oldest go first. Any thread."""

    def __init__(self, max_responses: int, max_chars: int = MAX_CHARS) -> None:
        """Keep so many chats, of so many characters together."""
        self._lock = threading.Lock()
        self._max_responses = max_responses
        self._max_chars = max_chars
        self._chars = 0
        self._kept: OrderedDict[tuple[str, str], tuple[list[dict[str, Any]], int]] = OrderedDict()

    def put(self, response_id: str, messages: list[dict[str, Any]], tenant: str = "") -> None:
        """Keep a chat of a tenant; nothing may change its messages afterwards."""
        chars = _chars(messages)
        with self._lock:
            self._kept[tenant, response_id] = (messages, chars)
            self._chars += chars
            while len(self._kept) > self._max_responses or self._chars > self._max_chars:
                _, (_, dropped) = self._kept.popitem(last=False)
                self._chars -= dropped

    def get(self, response_id: str, tenant: str = "") -> list[dict[str, Any]]:
        """Return the messages of a tenant's chat; raises ResponseNotFound."""
        with self._lock:
            found = self._kept.get((tenant, response_id))
        if found is None:
            raise ResponseNotFound(
                f"previous_response_id: {response_id[:80]!r} is not kept here (any more)",
                param="previous_response_id",
            )
        return found[0]


def _chars(value: Any) -> int:
    """Return about how many characters a chat, or a part of one, holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return MESSAGE_CHARS + sum(map(_chars, value.values()))
    return sum(map(_chars, value)) if isinstance(value, list) else 0
