"""Connections that say nothing, read nothing or are too many: others do not notice them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import logging
import resource
import socket
import threading
import time
from typing import Any

import pytest
from fake_engine import WAIT_S, FakeEngine, Script
from running_server import RunningServer, StartServer

from flowprefill.server.http.connections import (
    HOLD_AFTER_S,
    ConnectionTable,
    default_limit,
    raise_file_limit,
)
from flowprefill.server.options import ServerOptions

COMPLETIONS = "/v1/completions"
GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LONG_TEXT = "a long answer " * 3_000


def connect(server: RunningServer, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    connection.sendall(sent)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the server closes; a reset counts."""
    seen = b""
    try:
        while part := connection.recv(65_536):
            seen += part
    except ConnectionResetError:
        pass
    return seen


def never_reading(
    server: RunningServer, path: str = COMPLETIONS, *, stream: bool = True, **fields: Any
) -> socket.socket:
    """Ask for a long stream with a small receive buffer and do not read it."""
    if path == COMPLETIONS:
        fields |= {"prompt": "x", "max_tokens": 10**6}
    return server.raw_socket(path, {**fields, "stream": stream}, receive_bytes=4096)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", GET_HEALTH[:-2]])
def test_connection_without_a_whole_request_is_closed(
    start_server: StartServer, engine: FakeEngine, sent: bytes
) -> None:
    server = start_server(engine, header_timeout_s=0.2)
    with connect(server, sent) as connection:
        assert read_to_end(connection) == b""
    assert server.get_again("/health").status == 200


def test_idle_connection_is_closed_and_a_waiting_one_is_not(
    start_server: StartServer, engine: FakeEngine
) -> None:
    server = start_server(engine, header_timeout_s=1.0, idle_timeout_s=0.3)
    engine.script = Script(gate=threading.Event())
    body = {"prompt": "x", "stream": True}
    with server.raw_socket(COMPLETIONS, body) as waiting, connect(server, GET_HEALTH) as idle:
        assert read_to_end(idle).endswith(b'{"status": "ok"}')
        time.sleep(1.2)
        assert engine.script.gate is not None
        engine.script.gate.set()
        seen = b""
        while b"[DONE]" not in seen:
            seen += waiting.recv(65_536)


def test_client_that_never_reads_is_dropped_and_its_request_cancelled(
    start_server: StartServer, engine: FakeEngine
) -> None:
    server = start_server(engine, write_timeout_s=0.3)
    engine.script = Script(text=LONG_TEXT, gates={len(LONG_TEXT) - 1: threading.Event()})
    stalled = [never_reading(server) for _ in range(3)]
    assert [record.finish_reason for record in engine.wait_ended(3)] == ["cancelled"] * 3
    wait_until(lambda: server.server.context.generating == 0)
    wait_until(lambda: len(server.server.context.connections) == 0)
    engine.script = Script()
    assert server.post(COMPLETIONS, {"prompt": "x"}).status == 200
    for connection in stalled:
        connection.close()


def test_client_that_never_reads_is_found_out_after_some_hundred_tokens(
    start_server: StartServer, engine: FakeEngine
) -> None:
    """Not once megabytes have filled the kernel's buffers: a shorter stream never does."""
    server = start_server(engine, write_timeout_s=0.3)
    engine.script = Script(text=LONG_TEXT[:500], gates={499: threading.Event()})
    with never_reading(server):
        assert engine.wait_ended(1)[0].finish_reason == "cancelled"


@pytest.mark.parametrize("choices", [1, 3])
def test_stream_that_is_not_read_is_held_until_it_is(
    start_server: StartServer, engine: FakeEngine, choices: int
) -> None:
    server = start_server(engine)
    text = LONG_TEXT[:3000]
    engine.script = Script(text=text, gates={2999: threading.Event()})
    with never_reading(server, n=choices) as connection:
        engine.wait_submitted(choices)
        handles = engine.submitted
        wait_until(lambda: all(handle.holds for handle in handles))
        assert max(handle.output_tokens for handle in handles) < 3000
        engine.script.gates[2999].set()
        assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 5}).status == 200
        seen = b""
        while b"[DONE]" not in seen:
            part = connection.recv(65_536)
            assert part
            seen += part
    assert seen.count(b"data: ") == choices * (len(text) + 1) + 1
    assert all(handle.flows.is_set() for handle in handles)
    assert [record.finish_reason for record in engine.wait_ended(choices + 1)] == [
        "length", *["stop"] * choices
    ]  # fmt: skip


def test_chats_and_responses_are_held_too_and_whole_replies_never(
    start_server: StartServer, engine: FakeEngine
) -> None:
    server = start_server(engine)
    engine.script = Script(text=LONG_TEXT)
    messages = [{"role": "user", "content": "x"}]
    bodies = {"/v1/chat/completions": {"messages": messages}, "/v1/responses": {"input": "x"}}
    for number, (path, body) in enumerate(bodies.items()):
        with never_reading(server, path, **body):
            handle = engine.wait_submitted(number + 1)
            wait_until(lambda handle=handle: handle.holds == 1)
    with never_reading(server, stream=False):
        whole = engine.wait_submitted(3)
        wait_until(lambda: any(c.writing_paused for c in server.server.context.connections._open))
        time.sleep(2 * HOLD_AFTER_S)
        assert whole.holds == 0


def test_held_stream_gets_no_keep_alive_comments(
    start_server: StartServer, engine: FakeEngine
) -> None:
    server = start_server(engine, keep_alive_s=0.02)
    engine.script = Script(text=LONG_TEXT, gates={200: threading.Event()})
    with never_reading(server):
        handle = engine.wait_submitted(1)
        wait_until(lambda: handle.holds == 1)
        (connection,) = server.server.context.connections._open
        transport = connection.transport
        assert transport is not None
        waiting = []
        for _ in range(20):
            waiting.append(transport.get_write_buffer_size())
            time.sleep(0.02)
        assert waiting == sorted(waiting, reverse=True)
        assert waiting[-1] > 0


def test_long_reply_to_a_slow_client_goes_on_while_it_reads(
    start_server: StartServer, engine: FakeEngine
) -> None:
    """The whole takes longer than the deadline."""
    server = start_server(engine, write_timeout_s=1.5)
    for _ in range(10):
        text, times_s = read_slowly(server)
        longest_s = max(after - before for before, after in itertools.pairwise(times_s))
        if longest_s < 0.5:  # else the client had no core, and may have been too slow
            break
    assert json.loads(text)["openapi"]
    assert times_s[-1] - times_s[0] > 2.0


def read_slowly(server: RunningServer) -> tuple[bytes, list[float]]:
    """Ask for much and read it in small parts; returns it and when each part was read."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(WAIT_S)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(GET_HEALTH.replace(b"/health", b"/openapi.json"))
        times_s = [time.monotonic()]
        head, _, seen = connection.recv(2048).partition(b"\r\n\r\n")
        length = int(head.partition(b"Content-Length: ")[2].split()[0])
        try:
            while len(seen) < length and (part := connection.recv(2048)):
                seen += part
                time.sleep(0.05)
                times_s.append(time.monotonic())
        except ConnectionResetError:
            times_s.append(time.monotonic())
    return seen, times_s


def test_whole_reply_that_is_never_read_is_dropped_too(
    start_server: StartServer, engine: FakeEngine
) -> None:
    server = start_server(engine, write_timeout_s=0.3, header_timeout_s=WAIT_S)
    with never_reading(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(GET_HEALTH * 200_000)  # unread answers pile up
        wait_until(lambda: len(server.server.context.connections) == 0)


def test_client_that_reads_slowly_is_kept(start_server: StartServer, engine: FakeEngine) -> None:
    server = start_server(engine, write_timeout_s=WAIT_S)
    engine.script = Script(text=LONG_TEXT[:2000])
    with never_reading(server) as connection:
        seen = b""
        while b"[DONE]" not in seen:
            part = connection.recv(8192)
            assert part
            seen += part
            time.sleep(0.002)
    assert seen.count(b"data: ") == 2000 + 2  # the end of text, and the mark


def test_idle_connections_give_way_to_new_ones(
    start_server: StartServer, engine: FakeEngine
) -> None:
    server = start_server(engine, max_connections=10)
    engine.script = Script(text="ab", gates={1: threading.Event()})
    with server.raw_socket(COMPLETIONS, {"prompt": "x", "stream": True}) as running:
        engine.wait_submitted(1)
        idle = [connect(server, sent) for sent in (b"", b"GET /", GET_HEALTH) * 20]
        for _ in range(5):
            assert server.get("/health").status == 200
        assert len(server.server.context.connections) <= 10
        assert b"too many connections" in read_to_end(idle[0])
        engine.script.gates[1].set()
        seen = b""
        while b"[DONE]" not in seen:
            seen += running.recv(65_536)
    for connection in idle:
        connection.close()


def test_new_connection_is_refused_if_all_others_are_at_work(
    start_server: StartServer, engine: FakeEngine
) -> None:
    server = start_server(engine, max_connections=3)
    engine.script = Script(gate=threading.Event())
    busy = [server.raw_socket(COMPLETIONS, {"prompt": "x"}) for _ in range(3)]
    engine.wait_submitted(3)
    with connect(server) as connection:
        reply = read_to_end(connection)
    assert reply.startswith(b"HTTP/1.1 503")
    error = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert (error["code"], error["type"]) == ("not_ready", "server_error")
    for connection in busy:
        connection.close()
    engine.wait_ended(3)


def test_stalled_streams_and_half_bodies_do_not_hold_up_the_shutdown(
    start_server: StartServer, engine: FakeEngine
) -> None:
    server = start_server(engine)
    engine.script = Script(text=LONG_TEXT)
    stalled = [never_reading(server) for _ in range(3)]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    half = connect(server, head)
    wait_until(lambda: sum(c.writing_paused for c in server.server.context.connections._open) == 3)
    start = time.monotonic()
    server.stop(grace_s=WAIT_S - 1.0)
    assert time.monotonic() - start < WAIT_S / 2
    for connection in (*stalled, half):
        connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /health HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: other\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=["tls", "version", "header", "length", "line", "url", "no host", "hosts", "http2"],
)
def test_what_is_no_http_gets_an_error_object(server: RunningServer, sent: bytes) -> None:
    with connect(server, sent) as connection:
        reply = read_to_end(connection)
    assert reply.startswith(b"HTTP/1.0 400")
    error = json.loads(reply.partition(b"\r\n\r\n")[2])["error"]
    assert (error["param"], error["code"]) == ("request", "invalid_value")


def test_what_is_no_http_is_one_line_of_the_log(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(server, b"garbage\r\n\r\n") as connection:
        read_to_end(connection)
    (message,) = [record.getMessage() for record in caplog.records if "no HTTP" in record.message]
    assert "garbage" in message
    assert "\n" not in message


@pytest.mark.parametrize("path", ["/health", "/no-such-path", "/v1/completions"])
def test_expectation_that_is_not_met_gets_an_error_object(server: RunningServer, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    sent = f"{head}Expect: 200-ok\r\n\r\n"
    with connect(server, sent.encode()) as connection:
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 417 Expectation Failed\r\n")
    assert b"Content-Type: application/json" in head
    error = json.loads(body)["error"]
    assert (error["code"], error["param"]) == ("expectation_failed", "expect")
    assert error["message"] == "expect: got '200-ok', expected 100-continue"


def test_client_that_waits_for_100_continue_is_served(server: RunningServer) -> None:
    body = b'{"prompt": "x"}'
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Expect: 100-continue\r\nConnection: close\r\n\r\n"
    with connect(server, head.encode()) as one:
        assert one.recv(65_536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        one.sendall(body)
        assert read_to_end(one).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
def test_stream_to_a_client_of_http_1_0_ends_with_the_connection(
    server: RunningServer, path: str, connection: str
) -> None:
    """It knows no chunks, so one that keeps its connection would wait for the end of idling."""
    body = json.dumps({"prompt" if "compl" in path else "input": "x", "stream": True})
    head = f"POST {path} HTTP/1.0\r\nConnection: {connection}\r\nContent-Length: {len(body)}"
    with connect(server, f"{head}\r\n\r\n{body}".encode()) as one:
        one.settimeout(10.0)
        head, _, events = read_to_end(one).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert b"keep-alive" not in head
    assert events.startswith((b"data: ", b"event: "))
    assert b"[DONE]" in events or b"response.completed" in events


@pytest.mark.parametrize(
    "chunks",
    [b"nonsense\r\n", b"3\r\n{}\r\n\r\n", b"ffffffffffffffffff\r\n", b"-1\r\n\r\n"],
    ids=["word", "short", "huge", "negative"],
)
def test_body_in_broken_chunks_gets_an_error_object(server: RunningServer, chunks: bytes) -> None:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\n".encode()
    with connect(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks) as connection:
        reply = read_to_end(connection)
    assert reply.split(b" ", 2)[1] == b"400"
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_value"


def test_bug_outside_the_handlers_gets_an_error_object(
    start_server: StartServer, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp would answer in text, or in HTML to who accepts it."""
    server = start_server(engine)

    async def fails(*_: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(server.server.app.router, "resolve", fails)
    reply = server.get("/health", {"Accept": "text/html"})
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert reply.headers["Content-Type"].startswith("application/json")
    assert b"secret" not in reply.body


def test_thousands_of_errors_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    table = ConnectionTable(ServerOptions())
    loop = asyncio.new_event_loop()
    full = OSError(errno.EMFILE, "Too many open files")
    for _ in range(5000):
        table.on_loop_error(loop, {"message": "socket.accept()", "exception": full})
    loop.close()
    assert [record.getMessage() for record in caplog.records] == [
        "no new connections for now: [Errno 24] Too many open files"
    ]


def test_bad_requests_are_logged_once(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(50):
        with connect(server, b"nonsense\r\n\r\n") as connection:
            read_to_end(connection)
    assert len(caplog.records) == 1


def test_file_limit_is_raised_and_leaves_room() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = min(512, soft)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
        limit = raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limit >= soft
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [default_limit(n) for n in (100, 1024, 10**6)] == [50, 768, 16_384]
