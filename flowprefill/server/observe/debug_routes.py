"""GET /debug/...: what the executor ran, what was decided and why; called by app.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web

from flowprefill.engine.records import TimelineEntry
from flowprefill.errors import InvalidRequest
from flowprefill.server.context import SERVER
from flowprefill.server.engine_protocol import ServedEngine
from flowprefill.server.lanes import Lane
from flowprefill.server.observe.trace_slices import TraceSlices, row_name
from flowprefill.server.openai.replies import long_json

EXECUTOR_PROCESS = 1


class UnknownRequest(InvalidRequest):
    """No request of that id is known; only the last ones are."""

    status = 404
    code = "request_not_found"


def chrome_trace(entries: Sequence[TimelineEntry]) -> dict[str, Any]:
    """Return a trace for ui.perfetto.dev: one row per prefill, one for decoding.

    Times count from ``origin_s`` on the server's clock.
    """
    rows: dict[str, int] = {}
    origin_s = math.floor(min((entry.start_s for entry in entries), default=0.0))
    slices, events = TraceSlices(origin_s), []
    for entry in entries:
        row = rows.setdefault(_row_name(entry.run), len(rows) + 1)
        times_s = (entry.start_s, entry.end_s)
        args = {"run": entry.run, "predicted_ms": entry.predicted_s * 1e3}
        events.append(slices.slice((EXECUTOR_PROCESS, row), entry.segment, times_s, args))
    names = [row_name("thread_name", run, EXECUTOR_PROCESS, row) for run, row in rows.items()]
    return {
        "displayTimeUnit": "ms",
        "otherData": {"origin_s": origin_s},
        "traceEvents": names + events,
    }


def _row_name(run: str) -> str:
    # Decode steps differ only in how many sequences they hold; a row for each number would hide
    # the prefills.
    return "decode" if run.startswith("decode") else run


async def timeline(request: web.Request) -> web.Response:
    """Handle GET /debug/timeline."""
    return await _answer(request, lambda engine: chrome_trace(engine.timeline()))


async def decisions(request: web.Request) -> web.Response:
    """Handle GET /debug/decisions."""
    return await _answer(request, lambda engine: {"decisions": engine.decisions()})


async def requests(request: web.Request) -> web.Response:
    """Handle GET /debug/requests: the last ones in short."""
    return await _answer(request, lambda engine: {"requests": engine.recent_requests()})


async def one_request(request: web.Request) -> web.Response:
    """Handle GET /debug/requests/{id}: what happened to it and why."""
    wanted = request.match_info["id"]

    def find(engine: ServedEngine) -> dict[str, Any]:
        story = engine.story(wanted)
        if story is not None:
            return story
        choices = [choice["id"] for choice in engine.recent_requests(wanted)]
        hint = f"; its choices are {', '.join(reversed(choices))}" if choices else ""
        raise UnknownRequest(f"id: {wanted[:80]!r} is none of the last requests{hint}", param="id")

    return await _answer(request, find)


async def _answer(request: web.Request, look: Callable[[ServedEngine], Any]) -> web.Response:
    """Answer with what the engine tells, if the client may see it."""
    context = request.app[SERVER]
    context.check_debug(request.headers)
    engine = context.engine
    # Tens of thousands of entries: not on the event loop.
    text = await context.lanes.run(Lane.REPLIES, lambda: long_json(look(engine)))
    return web.json_response(text=text)
