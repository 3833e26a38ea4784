"""Server-sent events: one open stream to one client; called by generation.py."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import HttpVersion11, web

from flowprefill.errors import FlowPrefillError
from flowprefill.server.context import REQUEST_ID
from flowprefill.server.http.errors import REQUEST_ID_HEADER, error_body

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # Asks nginx and its like to pass every event on at once.
    "X-Accel-Buffering": "no",
}
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def encode_event(payload: dict[str, Any], name: str = "") -> bytes:
    """Encode one event, with a name of its own if it has one.

    Kept to ASCII: readers that split lines as Unicode does would cut an event at U+2028.
    """
    head = b"event: " + name.encode("ascii") + b"\n" if name else b""
    return head + b"data: " + json.dumps(payload, separators=(",", ":")).encode("ascii") + b"\n\n"


class EventStream:
    """The response stream of one request.

    Its headers go out with the first event, so that an error before it still gets its own status.
    """

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(headers=HEADERS)
        self.response.headers[REQUEST_ID_HEADER] = request[REQUEST_ID]
        if request.version < HttpVersion11:
            self.response.force_close()  # it has no chunks: the connection's end is the stream's

    @property
    def is_open(self) -> bool:
        """Whether the status has been sent."""
        return self.response.prepared

    async def _write(self, event: bytes) -> None:
        if not self.response.prepared:
            await self.response.prepare(self._request)
        # Written through to the socket at once; waits only for a client that does not read.
        await self.response.write(event)

    async def send(self, payload: dict[str, Any], name: str = "") -> None:
        """Send one event."""
        await self._write(encode_event(payload, name))

    async def keep_alive(self) -> None:
        """Send a comment, which clients skip and proxies count as life, unless others wait."""
        if not self._request.protocol.writing_paused:
            await self._write(KEEP_ALIVE)

    async def finish(self, *, is_marked: bool = True) -> None:
        """End the stream, marked as whole unless its last event says so."""
        if is_marked:
            await self._write(DONE)
        await self.response.write_eof()

    async def fail(self, error: FlowPrefillError) -> None:
        """Send an error event and end the stream without the mark of a whole one."""
        await self.send(error_body(error))
        await self.response.write_eof()
