"""The access log: one line for each request, whatever became of it."""

from __future__ import annotations

import logging
import re
import threading
import time
from typing import Any

import pytest
from fake_engine import WAIT_S, FakeEngine, Script
from running_server import RunningServer, StartServer

from flowprefill.engine.records import RequestRecord
from flowprefill.server import app
from flowprefill.server.http.sse import EventStream
from flowprefill.server.observe.telemetry import Call, Telemetry

ID = {"x-request-id": "mine"}


def lines_of(caplog: pytest.LogCaptureFixture, count: int) -> list[str]:
    """Wait for so many lines: a line is written after the client has its reply."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        lines = [r.getMessage() for r in caplog.records if r.name == "flowprefill.access"]
        if len(lines) >= count:
            break
        time.sleep(0.002)
    assert len(lines) == count
    return [re.sub(r"total=[0-9.]+ms", "total=T", line) for line in lines]


@pytest.fixture
def logged(
    engine: FakeEngine, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> RunningServer:
    caplog.set_level(logging.INFO)
    return start_server(engine, log_requests=True)


@pytest.mark.parametrize("stream", [False, True])
def test_line_tells_tokens_times_and_objective(
    logged: RunningServer, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    body = {"prompt": "Hi", "slo": {"ttft_ms": 250}, "stream": stream}
    assert logged.post("/v1/completions", body, ID).status == 200
    (line,) = lines_of(caplog, 1)
    assert line == (
        "mine POST /v1/completions 200 total=T prompt=3 cached=0 output=12 queue=1.0ms "
        "waiting=0.8ms prefill=4.0ms suspended=2.0ms preemptions=1 ttft=8.0ms slo=met"
    )


def test_line_of_several_choices(logged: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    logged.post("/v1/completions", {"prompt": "Hi", "n": 3, "slo": {"ttft_ms": 7}}, ID)
    (line,) = lines_of(caplog, 1)
    assert "prompt=9 cached=0 output=36 choices=3 queue=" in line
    assert line.endswith("slo=missed")


def test_lines_of_errors_have_their_status(
    logged: RunningServer, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    logged.post("/v1/completions", {"prompt": "Hi", "max_tokens": 0}, ID)
    logged.get("/nowhere%0Aforged", ID)
    engine.script = Script(error=ValueError("a bug"))
    logged.post("/v1/completions", {"prompt": "Hi"}, ID)
    refused, unknown, failed = lines_of(caplog, 3)
    assert refused == "mine POST /v1/completions 400 total=T"
    assert unknown == "mine GET (no route) 404 total=T"
    assert failed.startswith("mine POST /v1/completions 500 total=T prompt=3 cached=0 output=0")


def test_client_that_leaves_is_logged(
    logged: RunningServer, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = Script(gate=threading.Event())
    connection = logged.raw_socket("/v1/completions", {"prompt": "Hi"})
    engine.wait_submitted(1)
    connection.close()
    (line,) = lines_of(caplog, 1)
    assert " POST /v1/completions 499 total=T prompt=3 cached=0 output=0" in line


def test_client_that_leaves_a_stream_is_logged_alike_by_log_and_telemetry(
    engine: FakeEngine,
    start_server: StartServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    sent, told = EventStream.send, Told()
    monkeypatch.setattr(app, "open_telemetry", lambda _: told)
    logged = start_server(engine, log_requests=True)

    async def send(stream: EventStream, payload: dict[str, Any], name: str = "") -> None:
        if stream.is_open:
            raise ConnectionResetError("the client has gone")
        await sent(stream, payload, name)

    monkeypatch.setattr(EventStream, "send", send)
    logged.raw_socket("/v1/completions", {"prompt": "Hi", "stream": True}, 1).close()
    (line,) = lines_of(caplog, 1)
    assert " POST /v1/completions 499 total=T" in line
    assert [call.status for call in told.calls] == [499]


class Told(Telemetry):
    """Keeps the calls it is told of."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def add(self, call: Call) -> None:
        self.calls.append(call)

    def on_end(self, record: RequestRecord) -> None:
        """Nothing: calls are what is looked at."""

    def close(self, timeout_s: float = 0.0) -> None:
        """Nothing was started."""


def test_probes_are_not_logged(logged: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/health", "/ready", "/health/ready", "/metrics", "/live"):
        assert logged.get(path).status == 200
    logged.get("/v1/models/fake-model", ID)
    assert lines_of(caplog, 1) == ["mine GET /v1/models/{id} 200 total=T"]


def test_nothing_is_logged_unless_asked(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server.post("/v1/completions", {"prompt": "Hi"})
    server.stop()
    assert not [record for record in caplog.records if record.name == "flowprefill.access"]
