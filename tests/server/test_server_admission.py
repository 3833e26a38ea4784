"""What clients may state, who they are, and how refusals reach them."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine
from running_server import RunningServer, StartServer

from flowprefill.config import EngineConfig
from flowprefill.errors import ConfigError, Overloaded
from flowprefill.server.options import ServerOptions
from flowprefill.server.tenants import network_of

CONFIG = EngineConfig(classes={"chat": {"ttft_ms": 250}, "batch": {"background": True}})
TENANTS = {
    "shop": {"key": "sk-shop", "classes": ["batch", "chat"]},
    "lab": {"key": "sk-lab", "classes": ["batch"]},
    "us": {"key": "sk-us"},
}
HI = {"prompt": "Hi"}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(CONFIG)


def key(value: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {value}"}


def test_key_tells_tenant_and_its_first_class_is_the_default(
    engine: FakeEngine, start_server: StartServer
) -> None:
    server = start_server(engine, tenants=TENANTS)
    assert server.post("/v1/completions", HI, key("sk-shop")).status == 200
    assert engine.submitted[-1].request.tenant == "shop"
    assert engine.submitted[-1].request.client == "shop"
    assert engine.submitted[-1].slo.service_class == "batch"
    chat = {**HI, "slo": {"class": "chat"}}
    assert server.post("/v1/completions", chat, key("sk-shop")).status == 200
    assert engine.submitted[-1].slo.service_class == "chat"
    assert server.post("/v1/completions", HI, {"Authorization": "bearer  sk-us"}).status == 200
    assert engine.submitted[-1].slo.service_class == "default"


def test_without_tenants_addresses_tell_clients_apart(
    engine: FakeEngine, start_server: StartServer
) -> None:
    server = start_server(engine)
    for number, address in enumerate(("127.0.0.1", "127.0.0.2")):
        with server.raw_socket("/v1/completions", HI, address=address):
            request = engine.wait_submitted(number + 1).request
            assert (request.tenant, request.client) == ("", address)


@pytest.mark.parametrize(("address", "client"), [
    (None, ""), ("", ""), ("10.0.0.7", "10.0.0.7"), ("::ffff:10.0.0.7", "10.0.0.7"),
    ("2001:db8:1:2:3::4", "2001:0db8:0001:0002"), ("fe80::1%eth0", "fe80:0000:0000:0000"),
])  # fmt: skip
def test_network_of_tells_clients_apart(address: str | None, client: str) -> None:
    assert network_of(address) == client


@pytest.mark.parametrize("fields", [{"slo": {"class": "chat"}}, {"service_tier": "gold"}])
def test_class_of_another_key_is_refused(
    engine: FakeEngine, start_server: StartServer, fields: dict[str, Any]
) -> None:
    server = start_server(engine, tenants=TENANTS, service_tiers={"gold": "chat"})
    reply = server.post("/v1/completions", {**HI, **fields}, key("sk-lab"))
    assert reply.status == 400
    assert reply.error["param"] in ("slo.class", "service_tier")
    assert "a class of this key: batch" in reply.error["message"]


@pytest.mark.parametrize("headers", [{}, key("sk-wrong"), {"Authorization": "sk-shop"}, key("")])
def test_without_a_tenants_key_nothing_is_submitted(
    engine: FakeEngine, start_server: StartServer, headers: dict[str, str]
) -> None:
    server = start_server(engine, tenants=TENANTS)
    reply = server.post("/v1/completions", HI, headers)
    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert reply.headers["WWW-Authenticate"] == "Bearer"  # HTTP asks for it
    assert "sk-" not in reply.error["message"]
    assert engine.submitted == []
    assert server.get("/health").status == 200


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", HI), ("/detokenize", {"tokens": [72, 105]})]
)
def test_tokens_too_are_for_those_with_a_key(
    engine: FakeEngine, start_server: StartServer, path: str, body: dict[str, Any]
) -> None:
    """They cost a thread, the memory of a body and, of a chat, a process."""
    server = start_server(engine, tenants=TENANTS)
    for headers in ({}, key("sk-none")):
        reply = server.post(path, body, headers)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert server.post(path, b"no JSON").status == 401, "a stranger's body is not read"
    assert server.post(path, body, key("sk-lab")).status == 200
    assert server.get("/openapi.json").json()["paths"][path]["post"]["security"]
    assert server.server.context.body_memory.used == 0


@pytest.mark.parametrize("tenants", [{}, TENANTS])
def test_the_one_key_lets_clients_ask_beside_tenants(
    engine: FakeEngine, start_server: StartServer, tenants: dict[str, Any]
) -> None:
    server = start_server(engine, tenants=tenants, api_key="sk-all")
    for headers in ({}, key("sk-none")):
        reply = server.post("/v1/completions", HI, headers)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    for one in ("sk-all", *(["sk-lab"] if tenants else [])):
        assert server.post("/v1/completions", HI, key(one)).status == 200
    assert b"sk-all" not in server.get("/ready").body


@pytest.mark.parametrize("bad", [1, None, " sk", "sk\n"])
def test_a_bad_key_stops_the_start_and_is_not_shown(bad: Any) -> None:
    with pytest.raises(ConfigError, match="api_key: got") as caught:
        ServerOptions(api_key=bad)
    assert "sk" not in str(caught.value).replace("api_key", "")


def test_the_one_key_is_no_tenants() -> None:
    with pytest.raises(ConfigError, match=r"tenants\.a\.key: it is another tenant's, or api_key"):
        ServerOptions(tenants={"a": {"key": "k"}}, api_key="k")


@pytest.mark.parametrize(
    "tenants",
    [
        {"a": {}}, {"a": {"key": ""}}, {"a": {"key": 1}}, {"a": "k"}, {"": {"key": "k"}},
        {"a": {"key": "k", "classes": "chat"}}, {"a": {"key": "k", "limit": 1}}, ["a"],
        {"a": {"key": "k"}, "b": {"key": "k"}},
    ],
)  # fmt: skip
def test_bad_tenants_stop_the_start(tenants: Any) -> None:
    with pytest.raises(ConfigError, match="tenants"):
        ServerOptions(tenants=tenants)


def test_tenant_of_an_unknown_class_stops_the_start() -> None:
    options = ServerOptions(tenants={"a": {"key": "k", "classes": ["vip"]}})
    with pytest.raises(ConfigError, match=r"tenants\.a\.classes: got 'vip'"):
        options.check_classes(CONFIG)


@pytest.mark.parametrize(
    ("fields", "headers", "param"),
    [
        ({"slo": {"ttft_ms": 99}}, {}, "slo.ttft_ms"),
        ({}, {"x-slo-ttft-ms": "99.9"}, "x-slo-ttft-ms"),
        ({}, {"x-llm-d-slo-ttft-ms": "1"}, "x-llm-d-slo-ttft-ms"),
    ],
)
def test_objective_below_the_operators_floor_is_refused(
    engine: FakeEngine,
    start_server: StartServer,
    fields: dict[str, Any],
    headers: dict[str, str],
    param: str,
) -> None:
    server = start_server(engine, min_ttft_ms=100)
    reply = server.post("/v1/completions", {**HI, **fields}, headers)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert "at least 100" in reply.error["message"]
    fine = {**HI, "slo": {"ttft_ms": 100, "tpot_ms": 1}}
    assert server.post("/v1/completions", fine).status == 200


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"slo": {"ttft_ms": 500}}, {}),
        ({"slo": {"tpot_ms": 500}}, {}),
        ({"slo": {"on_miss": "drop"}}, {}),
        ({}, {"x-slo-tpot-ms": "20"}),
        ({"priority": -1}, {}),
    ],
)
def test_clients_that_may_state_nothing_are_told(
    engine: FakeEngine,
    start_server: StartServer,
    fields: dict[str, Any],
    headers: dict[str, str],
) -> None:
    server = start_server(engine, client_slo=False, client_priority=False)
    assert server.post("/v1/completions", {**HI, **fields}, headers).status == 400
    by_class = {**HI, "slo": {"class": "chat", "ttft_ms": None}, "priority": 0}
    assert server.post("/v1/completions", by_class).status == 200
    assert engine.submitted[-1].slo.ttft == 0.25


def test_refusal_tells_the_predicted_backlog_to_the_millisecond(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.load_error = Overloaded("7.3 s of work are waiting", retry_after_s=7.2501)
    reply = server.post("/v1/completions", b"{ not even parsed")
    assert (reply.status, reply.error["code"]) == (429, "overloaded")
    assert (reply.headers["Retry-After"], reply.headers["retry-after-ms"]) == ("8", "7251")


def test_refusal_of_what_would_always_be_late_says_not_to_retry(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.submit_error = Overloaded("the prefill alone is too long", retry_after_s=float("inf"))
    reply = server.post("/v1/completions", HI)
    assert reply.status == 429
    assert reply.headers["x-should-retry"] == "false"
    assert "Retry-After" not in reply.headers


def test_one_request_cannot_order_hours(engine: FakeEngine, start_server: StartServer) -> None:
    server = start_server(engine, max_request_s=60.0)
    engine.seconds_per_token = 0.01
    many = {"prompt": ["Hi"] * 10, "n": 10, "max_tokens": 100}
    reply = server.post("/v1/completions", many)
    assert reply.status == 400
    assert "100 choices (prompts times n)" in reply.error["message"]
    assert "100 s of work by prediction, expected at most 60 s" in reply.error["message"]
    assert engine.submitted == []
    assert server.post("/v1/completions", {**many, "n": 5}).status == 200
    alone = {"prompt": "Hi", "max_tokens": 100_000}
    assert server.post("/v1/completions", alone).status == 200
