"""The page at / and its data at /live: headers, shape, bounds, keys; in Chromium if it is there."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, opened
from fake_engine import FakeEngine, Segment, Stats
from running_server import RunningServer, StartServer

from flowprefill.errors import ConfigError
from flowprefill.server.observe import live_feed
from flowprefill.server.options import ServerOptions


def segment(run_id: int, run: str, ago_s: float, length_s: float) -> Segment:
    start_s = time.monotonic() - ago_s
    return Segment(run, "attention L0 [0, 64)", start_s, start_s + length_s, run_id=run_id)


def decided(ago_s: float, preempted: int | None, by: int, kind: str = "prefill") -> dict[str, Any]:
    return {
        "time_s": time.monotonic() - ago_s, "preempted": preempted, "dispatch": by, "kind": kind,
        "reason": "its deadline is sooner", "requests": ["b"],
    }  # fmt: skip


@pytest.fixture
def window_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """So long a past is shown: longer than any machine takes to ask."""
    monkeypatch.setattr(live_feed, "WINDOW_S", 1000.0)
    return 1000.0


def live(server: RunningServer) -> dict[str, Any]:
    """Ask once no answer is fresh any more."""
    time.sleep(live_feed.FRESH_S)
    reply = server.get("/live")
    assert reply.status == 200
    return dict(reply.json())


def test_page_is_self_contained_and_allows_only_its_own_script(server: RunningServer) -> None:
    reply = server.get("/")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    html = reply.body.decode()
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", html)
    assert not re.search(r"\son\w+=|\sstyle=", html)
    policy = reply.headers["Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert (rules["default-src"], rules["connect-src"]) == ("'none'", "'self'")
    assert rules["frame-ancestors"] == rules["form-action"] == rules["base-uri"] == "'none'"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"


def test_no_page_is_no_route_and_no_observer(engine: FakeEngine, start_server: StartServer) -> None:
    server = start_server(engine, page=False)
    assert [server.get(path).status for path in ("/", "/live")] == [404, 404]
    server.post("/v1/completions", {"prompt": "a"})
    assert json.loads(server.server.context.live.text(engine))["classes"] == []


def test_page_option_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="page: got 'yes', expected true or false"):
        ServerOptions.from_mapping({"page": "yes"})


def test_live_while_the_model_loads_is_503_and_the_page_is_there(start_server: StartServer) -> None:
    server = start_server(None)
    assert server.get("/").status == 200
    assert server.get("/live").error["message"] == "the model is still loading"


def test_live_wants_a_key_where_tenants_have_them(
    engine: FakeEngine, start_server: StartServer
) -> None:
    server = start_server(engine, tenants={"a": {"key": "secret"}})
    assert server.get("/").status == 200
    assert server.get("/live").status == 401
    assert server.get("/live", {"Authorization": "Bearer wrong"}).status == 401
    assert server.get("/live", {"Authorization": "Bearer secret"}).status == 200


def test_live_shows_bars_and_where_one_gave_way(
    engine: FakeEngine, server: RunningServer, window_s: float
) -> None:
    engine.segments = [
        segment(1, "prefill long", 3.0, 0.5),
        segment(1, "prefill long", 2.5, 0.5),
        segment(2, "prefill short", 2.0, 0.1),
        segment(3, "decode of 1", 1.9, 0.005),
        segment(4, "decode of 2", 1.894, 0.005),
        segment(1, "prefill long", 1.8, 0.4),
    ]
    engine.decided = [
        decided(2.0, 1, 2), decided(1.9, None, 3, "decode"), decided(window_s + 1, 7, 8),
        decided(1.0, 1, 9, "decode"),
    ]  # fmt: skip
    engine.current_stats = Stats(running=1, waiting=2, suspended=3, kv_blocks_used=25, segments=6)
    state = live(server)
    bars = [(bar["row"], bar["name"]) for bar in state["bars"]]
    assert bars == [
        (1, "prefill long"), (2, "prefill short"), (live_feed.DECODE_ROW, "decode"),
        (1, "prefill long"),
    ]  # fmt: skip
    lengths = [round(bar["end_s"] - bar["start_s"], 2) for bar in state["bars"]]
    assert lengths == [1.0, 0.1, 0.01, 0.4]
    gave_way = [(one["row"], one["by"], one["reason"]) for one in state["preemptions"]]
    reason = "its deadline is sooner"
    assert gave_way == [(1, 2, reason), (1, live_feed.DECODE_ROW, reason)]
    assert state["engine"] == {
        "running": 1, "waiting": 2, "suspended": 3,
        "kv_blocks_used": 25, "kv_blocks_cached": 0, "kv_blocks_total": 100,
    }  # fmt: skip


@pytest.mark.usefixtures("window_s")
def test_live_shows_no_calibration(engine: FakeEngine, server: RunningServer) -> None:
    engine.segments = [segment(1, "calibration", 1.0, 0.1), segment(1, "prefill a", 0.5, 0.1)]
    assert [bar["name"] for bar in live(server)["bars"]] == ["prefill a"]


@pytest.mark.usefixtures("window_s")
def test_live_goes_on_where_it_was(engine: FakeEngine, server: RunningServer) -> None:
    engine.segments = [segment(1, "prefill a", 1.0, 0.1)]
    assert len(live(server)["bars"]) == 1
    engine.segments.append(segment(2, "prefill b", 0.5, 0.1))
    assert [bar["row"] for bar in live(server)["bars"]] == [1, 2]
    assert [bar["row"] for bar in live(server)["bars"]] == [1, 2]


def test_live_counts_ttft_and_goodput_for_each_class(
    engine: FakeEngine, server: RunningServer
) -> None:
    for ttft_ms in (100, 100, 1):  # the engine's TTFT is 8 ms
        server.post("/v1/completions", {"prompt": "a", "slo": {"ttft_ms": ttft_ms}})
    server.post("/v1/completions", {"prompt": "a"})
    engine.wait_ended(4)
    state = live(server)
    assert state["classes"] == [
        {
            "name": "default", "requests": 4, "ttft_p50_ms": 8.0, "ttft_p95_ms": 8.0,
            "slo_ttft_ms": 1.0, "slo_requests": 3, "slo_met": 2,
        }
    ]  # fmt: skip
    assert state["goodput"] == {"met": 2, "requests": 3, "per_s": 0.03}


@pytest.mark.usefixtures("window_s")
def test_live_is_bounded_in_size(engine: FakeEngine, server: RunningServer) -> None:
    names = [f"prefill {i}-{'x' * 1000}" for i in range(20_000)]
    engine.segments = [segment(i, name, 9 - i * 8e-4 % 8, 1e-4) for i, name in enumerate(names)]
    engine.decided = [decided(1.0, i, i + 1) for i in range(1000)]
    engine.current_stats = Stats(segments=len(names))
    state = live(server)
    assert len(state["bars"]) == live_feed.MAX_BARS
    assert len(state["preemptions"]) == live_feed.MAX_PREEMPTIONS
    assert len(json.dumps(state)) < 128 * 1024


class CountingEngine(FakeEngine):
    """Counts how often it was looked at."""

    looks = 0

    def timeline(self, since: int = 0) -> list[Segment]:
        self.looks += 1
        return super().timeline(since)


def test_live_answers_many_pages_from_one_look(start_server: StartServer) -> None:
    engine = CountingEngine()
    server = start_server(engine)
    begin_s = time.monotonic()
    answers = {server.get("/live").body for _ in range(50)}
    most = 1 + int((time.monotonic() - begin_s) / live_feed.FRESH_S)
    assert 1 <= engine.looks <= most
    assert len(answers) == engine.looks


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_page_in_chromium(engine: FakeEngine, server: RunningServer, tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(_visit(engine, server, tmp_path), 250))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_page_asks_for_a_key_where_there_are_keys(
    engine: FakeEngine, start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(engine, tenants={"a": {"key": "secret"}})
    asyncio.run(asyncio.wait_for(_give_key(server, tmp_path), 250))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_page_without_a_timeline_still_chats(
    engine: FakeEngine, start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(engine, debug_routes="off")
    asyncio.run(asyncio.wait_for(_chat_only(server, tmp_path), 250))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_page_offers_nothing_while_the_model_loads(
    start_server: StartServer, tmp_path: Path
) -> None:
    asyncio.run(asyncio.wait_for(_watch_loading(start_server(None), tmp_path), 250))


async def _watch_loading(server: RunningServer, folder: Path) -> None:
    async with opened(f"{server.url}/", folder / "profile") as tab:
        await tab.until("$('state').textContent === 'the model is still loading'")
        assert await tab.value("$('show').disabled && $('send').disabled")
        await tab.value("$('text').value = 'Hi'; send(); 0")  # as Enter does
        assert await tab.value("$('log').innerText") == ""


async def _chat_only(server: RunningServer, folder: Path) -> None:
    async with opened(f"{server.url}/", folder / "profile") as tab:
        await tab.until("model === 'fake-model' && $('show').disabled")
        assert "--debug-routes on" in await tab.value("$('state').textContent")
        await tab.value("$('text').value = 'Hi'; send(); 0")
        await tab.until("reply === null && $('log').innerText.includes('Hello world')")


async def _give_key(server: RunningServer, folder: Path) -> None:
    async with opened(f"{server.url}/", folder / "profile") as tab:
        await tab.until("!$('key').hidden")
        assert "authorization: missing" in await tab.value("$('state').textContent")
        await tab.value("$('key').value = 'secret'; 0")
        await tab.until("model === 'fake-model' && $('state').textContent === ''")
        await tab.value("$('text').value = 'Hi'; send(); 0")
        await tab.until("reply === null && $('log').innerText.includes('Hello world')")


async def _visit(engine: FakeEngine, server: RunningServer, folder: Path) -> None:
    engine.segments = [segment(1, "prefill long", 2.0, 0.5), segment(2, "prefill b", 1.5, 0.3)]
    engine.decided = [decided(1.5, 1, 2)]
    async with opened(f"{server.url}/", folder / "profile") as tab:
        await tab.until("model === 'fake-model'")
        await tab.value("$('text').value = 'Hi'; send(); 0")
        await tab.until("reply === null && $('log').innerText.includes('Hello world')")
        await tab.until("$('classes').innerText.includes('8 ms')")
        await tab.value("showPreemption(); 0")
        await tab.until("!$('show').disabled")
        assert "short prompt 4" in await tab.value("$('log').innerText")
        for scheme, width in (("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)):
            await tab.look(scheme, width, 800)
            picture = await tab.screenshot()
            assert picture.startswith(b"\x89PNG")
            wide = await tab.value("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0
        assert tab.errors == []
    assert [one.slo.ttft for one in engine.submitted] == [None, 60.0, 0.5, 0.5, 0.5, 0.5]
