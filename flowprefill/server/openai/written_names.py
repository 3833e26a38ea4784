"""as_written: an error about a field under the name by which the body has it.

A body becomes engine requests, and one of /v1/responses a chat first; what is wrong may be noticed
only then, under a name that the client never wrote.
"""

from __future__ import annotations

from collections.abc import Mapping

from flowprefill.errors import InvalidRequest


def as_written(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """Return the error in the words of the body.

    Args:
        error: names a field, or a part of one: ``messages[1].content``.
        names: of fields and parts -> what the body calls them; the longest that fits counts.
    """
    head = error.param or ""
    while head and head not in names:
        head = head[: max(head.rfind("."), head.rfind("["), 0)]
    if not head:
        return error
    message = error.message.replace(head, names[head], 1)
    return type(error)(message, param=names[head] + (error.param or "")[len(head) :])
