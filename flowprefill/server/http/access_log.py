"""The access log of ``--log-requests``: one line for each HTTP request, when it has ended.

The application installs the middleware; the line goes to the logger ``flowprefill.access``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from aiohttp import web
from aiohttp.typedefs import Handler

from flowprefill.request import Timings
from flowprefill.server.context import HANDLES, IS_CLIENT_GONE, REQUEST_ID
from flowprefill.server.engine_protocol import ServedHandle

logger = logging.getLogger("flowprefill.access")

CLIENT_GONE = 499  # what proxies log for a client that left before it had a status
# Asked again and again by what watches the server, the page among it.
QUIET_PATHS = ("/health", "/health/ready", "/ready", "/metrics", "/live")


@web.middleware
async def access_log_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Log the request however it ends; outermost, so that it sees the status of an error."""
    if request.path in QUIET_PATHS:
        return await handler(request)
    start_s = time.monotonic()

    def tell(status: int) -> None:
        logger.info("%s", access_line(request, status, time.monotonic() - start_s))

    return await answered(request, handler, tell)


async def answered(
    request: web.Request, handler: Handler, tell: Callable[[int], None]
) -> web.StreamResponse:
    """Have a request handled and tell its status, however it ends; 500: with an exception."""
    status = 500
    try:
        response = await handler(request)
        # A stream that was not read whole has begun with 200.
        status = CLIENT_GONE if request.get(IS_CLIENT_GONE) else response.status
        return response
    except asyncio.CancelledError:
        status = CLIENT_GONE
        raise
    finally:
        tell(status)


def access_line(request: web.Request, status: int, seconds: float) -> str:
    """Return the line: id, method, route and status, then NAME=VALUE for what is known.

    The route is the pattern, never the text that a client sent.
    """
    route = request.match_info.route.resource
    known = route.canonical if route is not None else "(no route)"
    parts = [request.get(REQUEST_ID, "-"), request.method, known, str(status)]
    parts.append(f"total={_ms(seconds)}")
    return " ".join([*parts, *_of_choices(request.get(HANDLES, ()))])


def _of_choices(handles: Sequence[ServedHandle]) -> list[str]:
    """Tell of the engine's requests: tokens of all together; times of the one that came last."""
    if not handles:
        return []
    parts = [
        f"prompt={sum(handle.prompt_tokens for handle in handles)}",
        f"cached={sum(handle.cached_tokens for handle in handles)}",
        f"output={sum(handle.output_tokens for handle in handles)}",
    ]
    if len(handles) > 1:
        parts.append(f"choices={len(handles)}")
    ended = [handle.timings for handle in handles if handle.timings is not None]
    if not ended:
        return parts  # cancelled a moment ago: the engine has not ended it yet
    slowest = max(ended, key=lambda timings: timings.ttft or 0.0)
    return [*parts, *_of_timings(slowest), f"slo={_slo(ended)}"]


def _of_timings(timings: Timings) -> list[str]:
    return [
        f"queue={_ms(timings.queue)}",
        f"waiting={_ms(timings.waiting)}",
        f"prefill={_ms(timings.prefill_run)}",
        f"suspended={_ms(timings.suspended)}",
        f"preemptions={timings.preemptions}",
        f"ttft={'-' if timings.ttft is None else _ms(timings.ttft)}",
    ]


def _slo(ended: Sequence[Timings]) -> str:
    """``met`` if every choice met its objectives, ``-`` without any."""
    verdicts = [timings.slo_met for timings in ended if timings.slo_met is not None]
    return "-" if not verdicts else "met" if all(verdicts) else "missed"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}ms"
