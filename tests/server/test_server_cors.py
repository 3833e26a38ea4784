"""CORS: pages of allowed origins, and no others, may call the server from a browser."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_server import RunningServer, StartServer

from flowprefill.errors import ConfigError
from flowprefill.server.options import ServerOptions

PAGE = "https://page.test:8443"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def preflight(server: RunningServer, path: str, origin: str, method: str = "POST") -> Any:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    return server.request("OPTIONS", path, headers=headers)


@pytest.mark.parametrize("allowed", [(PAGE, "http://other.test"), ("*",)])
def test_an_allowed_page_may_send_and_read(
    engine: FakeEngine, start_server: StartServer, allowed: tuple[str, ...]
) -> None:
    server = start_server(engine, allowed_origins=allowed)
    shown = "*" if "*" in allowed else PAGE
    for path, method in ((CHAT, "POST"), ("/v1/models", "GET"), ("/v1/models/a", "GET")):
        reply = preflight(server, path, PAGE, method)
        assert reply.status == 204
        assert reply.headers["Access-Control-Allow-Origin"] == shown
        assert method in reply.headers["Access-Control-Allow-Methods"]
        assert reply.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
        assert "Origin" in reply.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in reply.headers
    for body, status in (({"prompt": "a"}, 200), ({"prompt": 5}, 400)):
        reply = server.post(COMPLETIONS, body, {"Origin": PAGE})
        assert reply.status == status
        assert reply.headers["Access-Control-Allow-Origin"] == shown
        assert "x-request-id" in reply.headers["Access-Control-Expose-Headers"]
    stream = server.post(COMPLETIONS, {"prompt": "a", "stream": True}, {"Origin": PAGE})
    assert stream.headers["Access-Control-Allow-Origin"] == shown
    assert stream.events()


@pytest.mark.parametrize("allowed", [(), (PAGE,)])
def test_other_pages_are_told_nothing(
    engine: FakeEngine, start_server: StartServer, allowed: tuple[str, ...]
) -> None:
    server = start_server(engine, allowed_origins=allowed)
    for origin in ("https://evil.test", "null", PAGE + ".evil", "https://page.test"):
        reply = preflight(server, CHAT, origin)
        assert reply.status == 405
        assert reply.headers["Allow"] == "POST"
        assert "Access-Control-Allow-Origin" not in reply.headers
        reply = server.post(COMPLETIONS, {"prompt": "a"}, {"Origin": origin})
        assert (reply.status, reply.error["code"]) == (403, "origin_not_allowed")
        assert "Access-Control-Allow-Origin" not in reply.headers
        assert ("Vary" in reply.headers) is bool(allowed)


def test_what_is_no_preflight_is_answered_as_ever(
    engine: FakeEngine, start_server: StartServer
) -> None:
    server = start_server(engine, allowed_origins=("*",))
    assert server.request("OPTIONS", CHAT).status == 405
    assert preflight(server, "/nowhere", PAGE).status == 404
    assert server.get("/health").status == 200
    assert "Access-Control-Allow-Origin" not in server.get("/health").headers


@pytest.mark.parametrize("wrong", ["page.test", "https://page.test/path", "", 5])
def test_an_origin_is_a_scheme_and_a_host(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="allowed_origins"):
        ServerOptions(allowed_origins=(wrong,))


def test_origins_come_from_a_config_file() -> None:
    values = json.loads('{"allowed_origins": ["http://localhost:3000"]}')
    assert ServerOptions.from_mapping(values).allowed_origins == ("http://localhost:3000",)
