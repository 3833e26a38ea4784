"""as_written: an error about a field under the name by which the body has it.

A body becomes engine requests, and one of /v1/responses a chat first; what is wrong may be noticed
only then, under a name that the client never wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from flowprefill.errors import InvalidRequest

# Another field that a message speaks of: "at most max_tokens = 5", "got it together with regex, ".
_OTHER = re.compile(r"\b\w+(?= = )|(?<=: got it together with )[\w.]+")


def as_written(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """Return the error in the words of the body.

    Args:
        error: names a field, or a part of one: ``messages[1].content``.
        names: of fields and parts -> what the body calls them; the longest that fits counts.
    """
    theirs = error.param or ""
    message = error.message.replace(theirs, _written(theirs, names), 1)
    start = message.rfind(", expected ") if error.given is not ... else 0  # behind what was given
    said = _OTHER.sub(lambda found: _written(found[0], names), message[start:])
    written = type(error)(message[:start] + said, param=_written(theirs, names) or None)
    written.given = error.given
    return written


def _written(name: str, names: Mapping[str, str]) -> str:
    head = name
    while head and head not in names:
        head = head[: max(head.rfind("."), head.rfind("["), 0)]
    return names[head] + name[len(head) :] if head else name
