"""Clients that leave, servers that stop, health meanwhile: over raw sockets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import threading
import time
from typing import Any

import pytest
from fake_engine import WAIT_S, FakeEngine, Script
from running_server import RunningServer, StartServer

from flowprefill.errors import CheckpointError, FlowPrefillError
from flowprefill.server.app import serve
from flowprefill.server.openai import generation

COMPLETIONS = "/v1/completions"


def read_until(connection: socket.socket, marker: bytes) -> bytes:
    """Read until the marker has come."""
    seen = b""
    while marker not in seen:
        part = connection.recv(4096)
        assert part, f"closed after {seen!r}"
        seen += part
    return seen


def wait_for(condition: Any) -> None:
    """Wait for something without an event of its own."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


def close_hard(connection: socket.socket) -> None:
    """Close with a reset, as a killed client's system does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_client_gone_in_mid_prefill_cancels(
    server: RunningServer, engine: FakeEngine, stream: bool, hard: bool
) -> None:
    engine.script = Script(gate=threading.Event())
    connection = server.raw_socket(COMPLETIONS, {"prompt": "long", "stream": stream, "n": 2})
    engine.wait_submitted(2)
    close_hard(connection) if hard else connection.close()
    assert [record.finish_reason for record in engine.wait_ended(2)] == ["cancelled"] * 2
    wait_for(lambda: server.server.context.generating == 0)
    assert server.get("/health").status == 200


def test_client_gone_in_mid_stream_cancels(server: RunningServer, engine: FakeEngine) -> None:
    engine.script = Script(gates={3: threading.Event()})
    connection = server.raw_socket(COMPLETIONS, {"prompt": "long", "stream": True})
    read_until(connection, b'"text":"l"')
    connection.close()
    (record,) = engine.wait_ended(1)
    assert (record.finish_reason, record.output_tokens) == ("cancelled", 3)


def test_client_gone_while_a_long_prompt_is_tokenised_cancels_after_it(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.submit_gate = threading.Event()
    engine.script = Script(gate=threading.Event())
    prompt = "x" * (generation.LONG_PROMPT_CHARS + 1)
    connection = server.raw_socket(COMPLETIONS, {"prompt": prompt})
    wait_for(lambda: server.server.context.generating == 1)
    connection.close()
    wait_for(lambda: server.server.context.generating == 0)
    assert engine.submitted == []
    engine.submit_gate.set()
    assert engine.wait_ended(1)[0].finish_reason == "cancelled"


def test_health_answers_while_a_long_prompt_is_tokenised(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.submit_gate = threading.Event()
    prompt = "x" * (generation.LONG_PROMPT_CHARS + 1)
    with server.raw_socket(COMPLETIONS, {"prompt": prompt}) as connection:
        wait_for(lambda: server.server.context.generating == 1)
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            assert server.get(path).status == 200
        engine.submit_gate.set()
        assert read_until(connection, b"finish_reason").startswith(b"HTTP/1.1 200")


def test_health_answers_while_many_requests_wait(server: RunningServer, engine: FakeEngine) -> None:
    gate = threading.Event()
    engine.script = Script(gate=gate)
    body = {"prompt": "long", "stream": True}
    connections = [server.raw_socket(COMPLETIONS, body) for _ in range(50)]
    engine.wait_submitted(50)
    assert server.get("/health").json() == {"status": "ok"}
    gate.set()
    for connection in connections:
        assert b'"finish_reason":"stop"' in read_until(connection, b"data: [DONE]\n\n")
        connection.close()


def test_second_submit_that_is_refused_cancels_the_first(
    server: RunningServer, engine: FakeEngine
) -> None:
    from flowprefill.errors import Overloaded

    engine.script = Script(gate=threading.Event())
    original = engine.submit

    def submit(*arguments: Any) -> Any:
        if engine.submitted:
            raise Overloaded("full", retry_after_s=1)
        return original(*arguments)

    engine.submit = submit  # type: ignore[method-assign]
    assert server.post(COMPLETIONS, {"prompt": ["a", "b"]}).status == 429
    assert engine.wait_ended(1)[0].finish_reason == "cancelled"


def test_one_failed_choice_cancels_the_others(server: RunningServer, engine: FakeEngine) -> None:
    waiting, failing = Script(gate=threading.Event()), Script(error=FlowPrefillError("broken"))
    original = engine.submit

    def submit(*arguments: Any) -> Any:
        engine.script = waiting if engine.submitted else failing
        return original(*arguments)

    engine.submit = submit  # type: ignore[method-assign]
    assert server.post(COMPLETIONS, {"prompt": "a", "n": 2}).status == 500
    assert sorted(r.finish_reason for r in engine.wait_ended(2)) == ["cancelled", "failed"]


def test_silent_stream_gets_keep_alive_comments(
    start_server: StartServer, engine: FakeEngine
) -> None:
    server = start_server(engine, keep_alive_s=0.02)
    gate = threading.Event()
    engine.script = Script(text="a", gate=gate)
    with server.raw_socket(COMPLETIONS, {"prompt": "x", "stream": True}) as connection:
        seen = read_until(connection, b": keep-alive\n\n")
        assert seen.startswith(b"HTTP/1.1 200")
        gate.set()
        assert b'"text":"a"' in read_until(connection, b"data: [DONE]\n\n")


def test_error_after_a_keep_alive_is_an_event_without_end_mark(
    start_server: StartServer, engine: FakeEngine
) -> None:
    server = start_server(engine, keep_alive_s=0.02)
    gate = threading.Event()
    engine.script = Script(gate=gate, error=FlowPrefillError("broken"))
    with server.raw_socket(COMPLETIONS, {"prompt": "x", "stream": True}) as connection:
        seen = read_until(connection, b": keep-alive\n\n")
        gate.set()
        seen += read_until(connection, b"\r\n0\r\n\r\n")
    assert b'data: {"error":{"message":"broken"' in seen
    assert b"[DONE]" not in seen


def test_unexpected_error_is_hidden_and_logged_with_the_request_id(
    server: RunningServer, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.submit_error = KeyError("secret")
    reply = server.post(COMPLETIONS, {"prompt": "x"}, {"x-request-id": "mine-17"})
    assert reply.status == 500
    assert "mine-17" in reply.error["message"]
    assert "secret" not in reply.error["message"]
    assert any("mine-17" in record.getMessage() for record in caplog.records if record.exc_info)


def test_shutdown_lets_running_requests_end_and_refuses_new_ones(
    server: RunningServer, engine: FakeEngine
) -> None:
    gate = threading.Event()
    engine.script = Script(text="ab", gates={1: gate})
    with server.raw_socket(COMPLETIONS, {"prompt": "x", "stream": True}) as connection:
        read_until(connection, b'"text":"a"')
        stopping = server.begin(server.server.stop(WAIT_S))
        wait_for(lambda: server.server.context.is_closing)
        assert server.get("/health").status == 200
        assert server.get("/ready").json()["status"] == "closing"
        refused = server.post(COMPLETIONS, {"prompt": "y"})
        assert (refused.status, refused.error["code"]) == (503, "not_ready")
        assert refused.headers["Retry-After"] == "5"
        gate.set()
        assert b'"text":"b"' in read_until(connection, b"data: [DONE]\n\n")
    stopping.result(WAIT_S)
    assert not engine.is_ready
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


@pytest.mark.parametrize("stream", [False, True])
def test_shutdown_after_the_grace_cancels_and_says_so(
    server: RunningServer, engine: FakeEngine, stream: bool
) -> None:
    engine.script = Script(gate=threading.Event())
    with server.raw_socket(COMPLETIONS, {"prompt": "x", "stream": stream}) as connection:
        engine.wait_submitted(1)
        server.begin(server.server.stop(0.0)).result(WAIT_S)
        reply = read_until(connection, b"shutting down")
    assert reply.startswith(b"HTTP/1.1 503")
    assert [record.finish_reason for record in engine.ends] == ["cancelled"]


def test_health_answers_and_ready_does_not_while_loading(start_server: StartServer) -> None:
    server = start_server(None)
    assert server.get("/health").status == 200
    assert server.get("/ready").status == 503
    assert server.get("/ready").json()["status"] == "loading"
    assert server.get("/version").json()["system_fingerprint"] is None
    assert server.get("/metrics").status == 200
    reply = server.post(COMPLETIONS, {"prompt": "x"})
    assert (reply.status, reply.error["code"]) == (503, "not_ready")
    engine = FakeEngine()

    async def attach() -> None:
        server.server.context.attach(engine)

    server.call(attach())
    ready = server.get("/ready")
    assert ready.status == 200
    assert ready.json() == {"status": "ready", "model": "fake-model", **engine.describe()}
    engine.is_ready = False
    assert server.get("/health/ready").status == 503


async def test_serve_loads_answers_and_ends_on_a_signal() -> None:
    engine = FakeEngine()
    urls: list[str] = []

    def on_ready(url: str) -> None:
        urls.append(url)
        os.kill(os.getpid(), signal.SIGTERM)

    async with asyncio.timeout(WAIT_S):
        await serve(lambda: engine, "127.0.0.1", 0, on_ready=on_ready)
    assert urls[0].startswith("http://127.0.0.1:")
    assert not engine.is_ready, "the engine was closed"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


async def test_serve_second_signal_skips_the_grace() -> None:
    engine = FakeEngine()
    engine.script = Script(gate=threading.Event())
    writers: list[asyncio.StreamWriter] = []

    async def leave_one_running(url: str) -> None:
        port = int(url.rsplit(":", 1)[1])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"prompt": "x"}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        writers.append(writer)
        await asyncio.to_thread(engine.wait_submitted, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    tasks: list[asyncio.Task[None]] = []

    def on_ready(url: str) -> None:
        tasks.append(asyncio.create_task(leave_one_running(url)))

    async with asyncio.timeout(WAIT_S):
        await serve(lambda: engine, "127.0.0.1", 0, on_ready=on_ready)
        await tasks[0]
    writers[0].close()
    assert [record.finish_reason for record in engine.ends] == ["cancelled"]


async def test_serve_signal_while_loading_closes_the_late_engine() -> None:
    engine, may_load = FakeEngine(), threading.Event()

    def load() -> FakeEngine:
        os.kill(os.getpid(), signal.SIGTERM)
        may_load.wait(WAIT_S)
        return engine

    async with asyncio.timeout(WAIT_S):
        serving = asyncio.create_task(serve(load, "127.0.0.1", 0))
        await asyncio.sleep(0.05)
        may_load.set()
        await serving
    assert not engine.is_ready


async def test_serve_failed_load_is_raised() -> None:
    def load() -> FakeEngine:
        raise CheckpointError("model.safetensors: truncated")

    with pytest.raises(CheckpointError, match="truncated"):
        await serve(load, "127.0.0.1", 0)


async def test_serve_taken_port_is_raised_before_loading() -> None:
    loads: list[int] = []

    def load() -> FakeEngine:
        loads.append(1)
        return FakeEngine()

    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="address already in use"),
    ):
        await serve(load, "127.0.0.1", taken.getsockname()[1])
    assert loads == []


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::", "0:0::0"])
def test_host_for_all_takes_both_families(
    start_server: StartServer, engine: FakeEngine, host: str
) -> None:
    server = start_server(engine, host=host)
    for number, address in enumerate(("127.0.0.1", "::1")):
        with socket.create_connection((address, server.port), timeout=WAIT_S) as connection:
            body = b'{"prompt": "x"}'
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            client = engine.wait_submitted(number + 1).request.client
        assert client == ("127.0.0.1", "0000:0000:0000:0000")[number]
