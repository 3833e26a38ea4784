"""The app's middleware that turns every exception into an OpenAI error; streams use its parts."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web

from flowprefill.errors import (
    DeadlinePassed,
    FlowPrefillError,
    NotReady,
    Overloaded,
    RequestCancelled,
    RequestFailed,
)
from flowprefill.server.context import REQUEST_ID, SERVER, ServerContext
from flowprefill.server.http.errors import (
    ENGINE_FAILED,
    REQUEST_ID_HEADER,
    InternalError,
    error_response,
    of_http,
)

logger = logging.getLogger(__name__)

_SAFE_REQUEST_ID = re.compile(r"[!-~]{1,200}")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def as_flowprefill_error(error: BaseException, request_id: str) -> FlowPrefillError:
    """Return the error to show; what speaks of the inside is logged and hidden."""
    if isinstance(error, RequestFailed):
        logger.error("request %s: %s", request_id, error)
        return RequestFailed(f"the request failed; the log has it under request id {request_id}")
    if isinstance(error, FlowPrefillError):
        return error
    logger.error("request %s: unexpected %s", request_id, type(error).__name__, exc_info=error)
    return InternalError(f"internal error; the server's log has it under request id {request_id}")


def shown_error(error: BaseException, context: ServerContext, request_id: str) -> FlowPrefillError:
    """Return the error as the client sees it, and count it if it sheds load."""
    shown = as_flowprefill_error(error, request_id)
    if isinstance(shown, NotReady) and context.has_failed:
        logger.error("request %s: %s", request_id, shown)
        shown = NotReady(f"{ENGINE_FAILED}; this is request id {request_id}")
    if isinstance(shown, RequestCancelled) and context.is_closing:
        # The client is still there: it was the server that gave up.
        shown = NotReady("the server is shutting down")
    if isinstance(shown, (Overloaded, DeadlinePassed, NotReady)):
        context.metrics.count_shed(shown.code)
    return shown


def request_id_of(request: web.Request) -> str:
    """Return the client's x-request-id if it is printable and short, else a new one."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if _SAFE_REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex[:16]}"


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every exception into an OpenAI error response and echo the request id.

    A whole reply is written only after this, when the connection counts as idle already. At the cap
    a client that is slow to read it may so lose its place to a new one.
    """
    request_id = request_id_of(request)
    request[REQUEST_ID] = request_id
    connections = request.app[SERVER].connections
    connections.begin_request(request.protocol)
    try:
        response = await handler(request)
    except web.HTTPException as error:
        response = error_response(of_http(error, request))
    except (asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        response = error_response(shown_error(error, request.app[SERVER], request_id))
    finally:
        connections.end_request(request.protocol)
    if not response.prepared:
        response.headers[REQUEST_ID_HEADER] = request_id
    return response
