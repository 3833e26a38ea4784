"""Connections: how many there may be, and how long a client may say nothing or read nothing.

app.py listens with connection_factory(); the middleware in errors.py tells when requests begin and
end, streaming.py which requests feed a stream. aiohttp closes idle connections
(keepalive_timeout); this adds what it lacks: a cap, a time for the first request, a time for a
client that does not read, and quiet bad requests. While a client does not read its stream, the
requests that feed it are held, so that the tokens of others do not wait for ones that none takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import resource
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web

from flowprefill.errors import FlowPrefillError, InvalidRequest, NotReady
from flowprefill.server.engine_protocol import ServedHandle
from flowprefill.server.http.errors import InternalError, error_body, error_response, of_http
from flowprefill.server.options import ServerOptions

logger = logging.getLogger(__name__)

# File descriptors for everything that is no connection: files of the model, pipes, the executor.
RESERVED_FILES = 256
MOST_CONNECTIONS = 16_384
MOST_FILES = 1 << 20
# Once the server stops, it waits no longer than this for a client that does not read.
CLOSING_WRITE_S = 1.0
# Errors of which there is one for each connection are logged once in this time.
QUIET_S = 60.0
# Bytes that the kernel takes beyond what the client's takes. Else it takes megabytes, and who never
# reads is found out, if at all, after 10,000 tokens. Of a stream it takes some ten tokens.
UNSENT_BYTES = 16_384
STREAM_UNSENT_BYTES = 2_048
# What its client does not read for so long is held; what comes meanwhile is kept here.
HOLD_AFTER_S = 0.1
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
)


def raise_file_limit() -> int:
    """Raise the process's limit of open files as far as it may; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


def default_limit(files: int) -> int:
    """Return how many connections fit below a limit of open files."""
    return min(MOST_CONNECTIONS, max(files - RESERVED_FILES, files // 2))


class ConnectionTable:
    """All connections of one server, on its event loop."""

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = options.max_connections or default_limit(files)
        self._open: set[Connection] = set()
        # Those without a request in progress; who has been so the longest comes first.
        self._idle: dict[web.RequestHandler, Connection] = {}
        self._is_closing = False
        self._last_logged: dict[str, float] = {}

    @property
    def first_request_s(self) -> float:
        """Seconds from the connection to the end of its first request's headers."""
        return self._options.header_timeout_s

    @property
    def write_s(self) -> float:
        """Seconds for which a client may read nothing of what waits for it."""
        most = self._options.write_timeout_s
        return min(most, CLOSING_WRITE_S) if self._is_closing else most

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, connection: Connection) -> None:
        """Count a connection in; at the limit, the one idle the longest gives way to it."""
        self._open.add(connection)
        self._idle[connection] = connection
        if len(self._open) > self._limit:
            self.log_seldom("full", "%d connections: the idle ones give way", self._limit)
            oldest = next(iter(self._idle.values()))
            self.closed(oldest)  # asyncio says so only later, when more may have come
            oldest.give_way()

    def closed(self, connection: Connection) -> None:
        """Count it out."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def begin_request(self, handler: web.RequestHandler) -> None:
        """A connection is not idle any more."""
        connection = self._idle.pop(handler, None)
        if connection is not None:
            connection.has_asked = True

    def end_request(self, handler: web.RequestHandler) -> None:
        """A connection is idle again, and streams nothing."""
        if isinstance(handler, Connection) and handler in self._open:
            self._idle[handler] = handler
            handler.feed()

    @staticmethod
    def begin_stream(handler: web.RequestHandler, handles: Sequence[ServedHandle]) -> None:
        """Hold these while the client does not read, until the connection's request has ended."""
        if isinstance(handler, Connection):
            handler.feed(handles)

    def close(self) -> None:
        """Be impatient from now on: the server stops."""
        self._is_closing = True
        for connection in self._open:
            connection.restart_write_timer()

    def log_seldom(self, kind: str, message: str, *values: object) -> None:
        """Log what happens to each of thousands of connections once a minute."""
        now = time.monotonic()
        if now - self._last_logged.get(kind, -QUIET_S) >= QUIET_S:
            self._last_logged[kind] = now
            logger.warning(message, *values)

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle what asyncio reports; it tries to accept, and fails, many times a second."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            self.log_seldom("files", "no new connections for now: %s", error)
            return
        loop.default_exception_handler(context)


class Connection(web.RequestHandler):
    """One connection: aiohttp's, with deadlines."""

    def __init__(self, table: ConnectionTable, server: web.Server, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._table = table
        self._socket: asyncio.Transport | None = None  # `transport` is None once it closes
        self._write_timer: asyncio.TimerHandle | None = None
        self._first_timer: asyncio.TimerHandle | None = None
        self._hold_timer: asyncio.TimerHandle | None = None
        self._feeds: Sequence[ServedHandle] = ()
        self._held: Sequence[ServedHandle] = ()
        self.has_asked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        super().connection_made(transport)
        assert isinstance(transport, asyncio.Transport)
        self._socket = transport
        # pause_writing() then comes with the first byte that the client's socket does not take.
        transport.set_write_buffer_limits(high=0)
        self._limit_unsent(UNSENT_BYTES)
        loop = asyncio.get_running_loop()
        self._first_timer = loop.call_later(self._table.first_request_s, self._end_if_silent)
        self._table.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is closed, by whichever side."""
        for timer in (self._first_timer, self._write_timer, self._hold_timer):
            if timer is not None:
                timer.cancel()
        self._table.closed(self)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Something waits for the client to read."""
        super().pause_writing()
        self._start_write_timer()
        self._hold_timer = asyncio.get_running_loop().call_later(HOLD_AFTER_S, self._hold)

    def resume_writing(self) -> None:
        """The client has read all of it."""
        super().resume_writing()
        for timer in (self._write_timer, self._hold_timer):
            if timer is not None:
                timer.cancel()
        self._write_timer = self._hold_timer = None
        held, self._held = self._held, ()
        for handle in held:
            handle.resume()

    def feed(self, handles: Sequence[ServedHandle] = ()) -> None:
        """Note whose tokens are streamed from now on; none: no stream."""
        if handles or self._feeds:
            self._limit_unsent(STREAM_UNSENT_BYTES if handles else UNSENT_BYTES)
        self._feeds = handles

    def restart_write_timer(self) -> None:
        """Give the client the time that it has by now, from now on, for reading what waits."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._start_write_timer()

    def give_way(self) -> None:
        """Close, so that another connection may be kept."""
        assert self._socket is not None
        body = json.dumps(error_body(NotReady("the server has too many connections"))).encode()
        if not self.has_asked:
            self._socket.write(FULL % (len(body), body))
        self.force_close()

    def _limit_unsent(self, size: int) -> None:
        own = None if self._socket is None else self._socket.get_extra_info("socket")
        if own is not None:
            with contextlib.suppress(OSError):  # not TCP, or closed
                own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, size)

    def _hold(self) -> None:
        self._held = self._feeds
        for handle in self._held:
            handle.hold()
        if self._held:  # from now on what waits for the client becomes less if it reads
            self.restart_write_timer()

    def _start_write_timer(self) -> None:
        loop = asyncio.get_running_loop()
        left = 0 if self._socket is None else self._socket.get_write_buffer_size()
        self._write_timer = loop.call_later(self._table.write_s, self._abort_if_stalled, left)

    def _abort_if_stalled(self, left_before: int) -> None:
        """Give a client that has read some of a long reply as much time again."""
        if self._socket is not None and self._socket.get_write_buffer_size() < left_before:
            self._start_write_timer()
        else:
            self._abort()

    def _end_if_silent(self) -> None:
        if not self.has_asked:
            self._abort()

    def _abort(self) -> None:
        # Not close(): that would wait until the client has read.
        if self._socket is not None:
            self._socket.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP; aiohttp would log each with its traceback and answer in text."""
        error: FlowPrefillError
        if status >= 500:  # of no handler of ours, whose errors the middleware turns into replies
            super().handle_error(request, status, exc, message)  # logs; raises if one has begun
            error = InternalError("internal error; the server's log has it")
        else:
            said = " ".join((message or "bad request").split())[:200]
            self._table.log_seldom("bad", "a request that is no HTTP: %s", said)
            error = InvalidRequest(f"request: {said}", param="request")
        response = error_response(error)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write a response; what aiohttp answers before any middleware has the shape of others."""
        if isinstance(resp, web.HTTPException):
            resp = error_response(of_http(resp, request))
        return await super().finish_response(request, resp, start_time)


def connection_factory(
    table: ConnectionTable, server: web.Server, options: ServerOptions
) -> Callable[[], Connection]:
    """Return what asyncio calls for each new connection."""
    loop = asyncio.get_running_loop()

    def make() -> Connection:
        return Connection(
            table,
            server,
            loop=loop,
            access_log=None,
            auto_decompress=False,  # compressed bodies are refused: see incoming.py
            keepalive_timeout=options.idle_timeout_s,
            lingering_time=2.0,  # for the rest of a body that was refused
        )

    return make
