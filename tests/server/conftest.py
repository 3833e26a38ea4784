"""Fixtures of the server's tests: a scripted engine, a server over it, the openai client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine
from running_server import RunningServer, StartServer

from flowprefill.server.options import ServerOptions


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    servers: list[RunningServer] = []

    def start(engine: FakeEngine | None, host: str = "127.0.0.1", **options: Any) -> RunningServer:
        servers.append(RunningServer(engine, ServerOptions(**options), host))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture
def server(engine: FakeEngine, start_server: StartServer) -> RunningServer:
    return start_server(engine)


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
