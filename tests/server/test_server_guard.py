"""Host and Origin: what a page in a browser may not do to a server on this machine."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from fake_engine import WAIT_S, FakeEngine
from running_server import RunningServer, StartServer

from flowprefill.errors import ConfigError
from flowprefill.server.http.guard import is_loopback
from flowprefill.server.options import ServerOptions

COMPLETIONS = "/v1/completions"
EVERYWHERE = "0.0.0.0"
LOOPBACK = ("localhost", "LOCALHOST.", "app.localhost", "127.0.0.1", "127.8.9.1", "[::1]")
FOREIGN = ("evil.test", "localhost.evil.test", "127.0.0.1.evil.test", "192.168.0.5", "[fe80::1]")


def raw(server: RunningServer, head: str) -> bytes:
    """Send a request's head as it is; returns the whole reply."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_on_loopback_a_host_must_be_this_machine(server: RunningServer) -> None:
    for name in (*LOOPBACK, "workstation", "compose_name-1"):
        for host in (name, f"{name}:{server.port}", f"{name}:80"):
            assert server.get("/health", {"Host": host}).status == 200, host
    for name in (*FOREIGN, "evil.test:8000", "user@localhost", "local host", ":8000", "123"):
        for path in ("/health", "/v1/models", "/", "/live", "/debug/requests", "/nowhere"):
            reply = server.get(path, {"Host": name})
            assert (reply.status, reply.error["code"]) == (403, "host_not_allowed"), (name, path)
        assert name in reply.error["message"]
        assert "--allowed-hosts" in reply.error["message"]
    assert server.post(COMPLETIONS, {"prompt": "a"}, {"Host": "evil.test"}).status == 403


def test_no_host_at_all_is_no_browser_and_passes(server: RunningServer) -> None:
    assert b" 200 OK" in raw(server, "GET /health HTTP/1.0\n\n")
    twice = "GET /health HTTP/1.1\nHost: localhost\nHost: evil.test\nConnection: close\n\n"
    assert b" 200 OK" not in raw(server, twice)


def test_allowed_hosts_are_taken_besides(engine: FakeEngine, start_server: StartServer) -> None:
    server = start_server(engine, allowed_hosts=("Models.example", "192.168.0.5"))
    for host in ("models.example", "MODELS.example.:443", "192.168.0.5:80", "localhost"):
        assert server.get("/health", {"Host": host}).status == 200, host
    assert server.get("/health", {"Host": "other.example"}).status == 403
    assert start_server(engine, allowed_hosts=("*",)).get("/", {"Host": "evil.test"}).status == 200


def test_elsewhere_only_named_hosts_are_checked(
    engine: FakeEngine, start_server: StartServer
) -> None:
    behind_proxy = start_server(engine, EVERYWHERE)
    body, page = {"prompt": "a"}, {"Origin": "https://models.example", "Host": "127.0.0.1:8000"}
    assert behind_proxy.get("/health", {"Host": "models.example"}).status == 200
    assert behind_proxy.post(COMPLETIONS, body, page).status == 200
    named = start_server(engine, EVERYWHERE, allowed_hosts=("models.example",))
    assert named.get("/health", {"Host": "models.example"}).status == 200
    assert named.get("/health", {"Host": "evil.test"}).status == 403
    assert named.post(COMPLETIONS, body, page).status == 403


def test_pages_of_other_origins_may_not_send(engine: FakeEngine, start_server: StartServer) -> None:
    server = start_server(engine, allowed_origins=("https://page.test",))
    own = f"127.0.0.1:{server.port}"

    def post(**headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return server.post(COMPLETIONS, {"prompt": "a"}, named).status

    assert post() == 200
    assert post(Origin=f"http://{own}") == 200
    assert post(Origin="https://page.test") == 200
    assert post(Origin="http://localhost:80", Host="localhost") == 200
    for origin in ("https://evil.test", "null", "http://127.0.0.1:1", "http://[::1", "file://"):
        assert post(Origin=origin) == 403, origin
    submitted = len(engine.submitted)
    # A browser's own verdict counts for more; localhost:3000 is the same site, not the same origin.
    for site, status in (("same-origin", 200), ("none", 200), ("same-site", 403), ("x", 403)):
        assert post(Sec_Fetch_Site=site) == status, site
        assert post(Sec_Fetch_Site=site, Origin="https://page.test") == 200
    assert post(Sec_Fetch_Site="cross-site", Origin=f"http://{own}") == 403
    assert len(engine.submitted) == submitted + 6
    assert server.get("/v1/models", {"Origin": "https://evil.test"}).status == 200


def test_a_browsers_verdict_counts_behind_a_proxy_too(
    engine: FakeEngine, start_server: StartServer
) -> None:
    server = start_server(engine, EVERYWHERE)
    page = {"Origin": "https://evil.test", "Sec-Fetch-Site": "cross-site"}
    reply = server.post(COMPLETIONS, {"prompt": "a"}, page)
    assert (reply.status, reply.error["code"]) == (403, "origin_not_allowed")
    assert "https://evil.test" in reply.error["message"]


def test_loopback_is_told_from_what_looks_like_it() -> None:
    assert all(map(is_loopback, (*LOOPBACK, "::ffff:127.0.0.1", "::1%lo")))
    assert not any(map(is_loopback, (*FOREIGN, "", "0.0.0.0", "::", "2130706433", "localhosts")))


@pytest.mark.parametrize("wrong", ["http://a.test", "a.test:80", "", "a b", 5])
def test_an_allowed_host_is_a_name_without_a_port(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="allowed_hosts"):
        ServerOptions(allowed_hosts=(wrong,))
    assert ServerOptions.from_mapping({"allowed_hosts": ["[::1]", "a.test"]}).allowed_hosts
