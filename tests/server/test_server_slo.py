"""The SLO of a request: field over header over class over default, value by value."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine
from running_server import RunningServer, StartServer

from flowprefill.config import EngineConfig
from flowprefill.request import SLO

CONFIG = EngineConfig(
    default_ttft_ms=9000,
    classes={
        "chat": {"ttft_ms": 250, "tpot_ms": 100},
        "batch": {"ttft_ms": 60_000, "on_miss": "drop"},
        "free": {},
    },
)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(CONFIG)


@pytest.fixture
def server(engine: FakeEngine, start_server: StartServer) -> RunningServer:
    return start_server(engine, service_tiers={"flex": "batch", "gold": "chat"})


def slo(
    server: RunningServer,
    engine: FakeEngine,
    fields: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> SLO:
    """Submit one request and return the SLO the engine was given."""
    reply = server.post("/v1/completions", {"prompt": "Hi", **(fields or {})}, headers)
    assert reply.status == 200, reply.body
    return engine.submitted[-1].slo


def test_same_objectives_by_field_header_and_class(
    server: RunningServer, engine: FakeEngine
) -> None:
    by_field = slo(server, engine, {"slo": {"ttft_ms": 250, "tpot_ms": 100}})
    by_header = slo(server, engine, headers={"x-slo-ttft-ms": "250", "x-slo-tpot-ms": "100"})
    by_llm_d = slo(
        server, engine, headers={"X-LLM-D-SLO-TTFT-MS": "250.0", "x-llm-d-slo-tpot-ms": "1e2"}
    )
    by_class = slo(server, engine, {"slo": {"class": "chat"}})
    by_class_header = slo(server, engine, headers={"x-slo-class": "chat"})
    by_tier = slo(server, engine, {"service_tier": "gold"})
    every = [by_field, by_header, by_llm_d, by_class, by_class_header, by_tier]
    assert {(each.ttft, each.tpot, each.on_miss) for each in every} == {(0.25, 0.1, "demote")}
    assert [each.service_class for each in every] == ["default"] * 3 + ["chat"] * 3


def test_chat_endpoint_reads_the_same_fields(server: RunningServer, engine: FakeEngine) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "slo": {"ttft_ms": 1.5}}
    assert server.post("/v1/chat/completions", body).status == 200
    assert engine.submitted[-1].slo.ttft == 0.0015


def test_nothing_given_is_the_default(server: RunningServer, engine: FakeEngine) -> None:
    assert slo(server, engine) == SLO(ttft=9.0)
    assert slo(server, engine, {"slo": {}, "service_tier": None}) == SLO(ttft=9.0)
    assert slo(server, engine, {"slo": {"class": "default"}}) == SLO(ttft=9.0)


def test_class_without_objectives_is_best_effort_not_the_default(
    server: RunningServer, engine: FakeEngine
) -> None:
    assert slo(server, engine, {"slo": {"class": "free"}}) == SLO(service_class="free")


@pytest.mark.parametrize(
    ("fields", "headers", "expected"),
    [
        # field over header, value by value
        ({"slo": {"ttft_ms": 10}}, {"x-slo-ttft-ms": "20"}, (0.01, None, "default")),
        ({"slo": {"tpot_ms": 10}}, {"x-slo-ttft-ms": "20"}, (0.02, 0.01, "default")),
        ({"slo": {"ttft_ms": None}}, {"x-slo-ttft-ms": "20"}, (0.02, None, "default")),
        # header over class
        ({"slo": {"class": "chat"}}, {"x-slo-ttft-ms": "20"}, (0.02, 0.1, "chat")),
        # field over class
        ({"slo": {"class": "chat", "ttft_ms": 10}}, {}, (0.01, 0.1, "chat")),
        # class by field over class by header over tier
        ({"slo": {"class": "chat"}}, {"x-slo-class": "batch"}, (0.25, 0.1, "chat")),
        ({"service_tier": "gold"}, {"x-slo-class": "batch"}, (60.0, None, "batch")),
        # our header over llm-d's
        ({}, {"x-llm-d-slo-ttft-ms": "30", "x-slo-ttft-ms": "20"}, (0.02, None, "default")),
    ],
)
def test_precedence(
    server: RunningServer,
    engine: FakeEngine,
    fields: dict[str, Any],
    headers: dict[str, str],
    expected: tuple[float, float | None, str],
) -> None:
    given = slo(server, engine, fields, headers)
    assert (given.ttft, given.tpot, given.service_class) == expected


def test_on_miss_by_class_and_by_field(server: RunningServer, engine: FakeEngine) -> None:
    assert slo(server, engine, {"service_tier": "flex"}).on_miss == "drop"
    changed = slo(server, engine, {"slo": {"class": "batch", "on_miss": "demote"}})
    assert (changed.on_miss, changed.ttft) == ("demote", 60.0)


def test_openai_tier_that_is_not_mapped_changes_nothing(
    server: RunningServer, engine: FakeEngine
) -> None:
    for tier in ("auto", "default", "priority", "scale"):
        assert slo(server, engine, {"service_tier": tier}) == SLO(ttft=9.0)


def test_unknown_class_lists_the_known_ones(server: RunningServer) -> None:
    reply = server.post("/v1/completions", {"prompt": "Hi", "slo": {"class": "vip"}})
    assert reply.status == 400
    assert "batch, chat, default, free" in reply.error["message"]
