"""CORS: lets browser pages of the allowed origins call the server; the application installs it.

Off unless ``--allowed-origins`` names some: then every page in a browser on this machine may use
the server of ``localhost``.
"""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from flowprefill.server.context import SERVER

PREFLIGHT_AGE_S = 600
_EXPOSED = "x-request-id, Retry-After, retry-after-ms, x-should-retry"


def _allowed_origin(request: web.Request) -> str | None:
    """Return what to answer as the allowed origin; None: the page is not allowed, or there is none.

    Credentials (cookies) are never allowed, so "*" can be answered as it is.
    """
    allowed = request.app[SERVER].options.allowed_origins
    origin = request.headers.get("Origin")
    if origin is None:
        return None
    return "*" if "*" in allowed else origin if origin in allowed else None


@web.middleware
async def cors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a browser's question whether a page may send a request."""
    wanted = request.headers.get("Access-Control-Request-Method")
    if request.method == "OPTIONS" and wanted and _allowed_origin(request):
        problem = request.match_info.http_exception
        if isinstance(problem, web.HTTPMethodNotAllowed):
            return web.Response(status=204, headers=_preflight_headers(request, problem))
    return await handler(request)


def _preflight_headers(request: web.Request, route: web.HTTPMethodNotAllowed) -> dict[str, str]:
    asked = request.headers.get("Access-Control-Request-Headers")
    headers = {
        "Access-Control-Allow-Methods": ", ".join(sorted(route.allowed_methods)),
        "Access-Control-Max-Age": str(PREFLIGHT_AGE_S),
    }
    if asked:
        headers["Access-Control-Allow-Headers"] = asked
    return headers


async def add_cors_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Tell the browser that the page may read this response; called before its head is sent."""
    if not request.app[SERVER].options.allowed_origins:
        return
    response.headers.add("Vary", "Origin")
    origin = _allowed_origin(request)
    if origin is not None:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
