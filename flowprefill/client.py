"""What every command that asks a server needs: URL, key, why none answers; explain, chat, bench."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse

from flowprefill.errors import InvalidRequest

KEY_VARIABLE = "FLOWPREFILL_API_KEY"


def server_url(text: str, flag: str = "--url") -> str:
    """Return a server's URL without a slash at its end.

    Args:
        flag: where it was given.

    Raises:
        InvalidRequest: it is not http://HOST:PORT.
    """
    try:
        parts = urllib.parse.urlsplit(text)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        is_url = False
    if not is_url or not text.isascii() or not text.isprintable() or " " in text:
        raise InvalidRequest.field(flag, text, "http://HOST:PORT")
    return text.rstrip("/")


def bearer(key: str | None) -> dict[str, str]:
    """Return the headers that carry a key; None: that of the environment, if there is one.

    Raises:
        InvalidRequest: no header can carry it. It is not shown.
    """
    if key is None:
        key = os.environ.get(KEY_VARIABLE, "")
    if not key.isascii() or not key.isprintable():
        raise InvalidRequest(
            f"--api-key, or {KEY_VARIABLE}: got {len(key)} characters, expected printable ASCII"
        )
    return {"Authorization": f"Bearer {key}"} if key else {}


def why_no_answer(error: Exception) -> str:
    """Return what kept a server from answering, as the system says it: "Connection refused"."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return str(reason)


def refusal_of(error: urllib.error.HTTPError) -> str:
    """Return what a server says about a request that it refuses; its status if that is not read."""
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, http.client.HTTPException, ValueError, RecursionError, LookupError, TypeError):
        return f"{error.url}: status {error.code}"
