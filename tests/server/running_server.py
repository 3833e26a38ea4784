"""A server on a real socket in its own thread, and a plain HTTP client for it."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fake_engine import WAIT_S, FakeEngine

from flowprefill.server.app import Server
from flowprefill.server.options import ServerOptions


@dataclass
class Reply:
    """One HTTP reply, read whole."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return dict(error)

    def events(self) -> list[Any]:
        """The payloads of a whole stream, without its end mark."""
        parts = [part for part in self.body.decode().split("\n\n") if part]
        assert parts.pop() == "data: [DONE]"
        return [json.loads(p.removeprefix("data: ")) for p in parts if not p.startswith(":")]


class RunningServer:
    """A server with its own event loop in its own thread."""

    def __init__(
        self,
        engine: FakeEngine | None,
        options: ServerOptions | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.call(self._make(engine, options))
        self.port = self.call(self.server.start(host, 0))
        self._is_stopped = False
        self.tls: ssl.SSLContext | None = None  # what `request` trusts, of a server with TLS

    @staticmethod
    async def _make(engine: FakeEngine | None, options: ServerOptions | None) -> Server:
        return Server(engine, options)

    def call(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WAIT_S)

    def begin(self, coroutine: Any) -> Any:
        """Start a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    @property
    def url(self) -> str:
        return f"{'https' if self.server.tls else 'http'}://127.0.0.1:{self.port}"

    def stop(self, grace_s: float = 0.0) -> None:
        if not self._is_stopped:
            self._is_stopped = True
            self.call(self.server.stop(grace_s))

    def end(self) -> None:
        """Stop the server and its loop."""
        self.stop()
        self.call(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """Send one request; dictionaries and lists go as JSON, bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        if self.tls is not None:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=WAIT_S, context=self.tls
            )
        try:
            sent = {"Content-Type": "application/json"} if body is not None else {}
            raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
            connection.request(method, path, raw, {**sent, **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, headers: dict[str, str] | None = None) -> Reply:
        return self.request("GET", path, headers=headers)

    def get_again(self, path: str) -> Reply:
        """Get, over new connections as long as the server closes them.

        For a server with a short `header_timeout_s`: where other programs have the cores, a client
        may not get its request said in time.
        """
        until = time.monotonic() + WAIT_S
        while True:
            try:
                return self.get(path)
            except (ConnectionError, ssl.SSLError):
                assert time.monotonic() < until, "no connection lasts"

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
        return self.request("POST", path, body, headers)

    def raw_socket(
        self, path: str, body: dict[str, Any], receive_bytes: int = 0, address: str = "127.0.0.1"
    ) -> socket.socket:
        """Open a connection, send a whole request, and leave the reply to the caller.

        Args:
            receive_bytes: what the client's kernel takes before it is read; 0: as is usual.
            address: the client's.
        """
        raw = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(raw)}\r\n\r\n"
        )
        connection = socket.socket()
        connection.settimeout(WAIT_S)
        if receive_bytes:  # before it connects: it bounds the window
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.bind((address, 0))
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(head.encode() + raw)
        return connection


StartServer = Callable[..., RunningServer]
