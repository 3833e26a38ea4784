"""Errors to HTTP: the JSON body, status and retry headers of every error."""

from __future__ import annotations

import json
import math
from typing import Any

from aiohttp import web

from flowprefill.errors import (
    DeadlinePassed,
    FlowPrefillError,
    InvalidRequest,
    NotReady,
    Overloaded,
)

REQUEST_ID_HEADER = "x-request-id"
NOT_READY_RETRY_S = 5
ENGINE_FAILED = "the engine has failed and has to be restarted; its log says why"


class UnknownRoute(InvalidRequest):
    """No such path."""

    status = 404
    code = "unknown_url"


class WrongMethod(InvalidRequest):
    """The path exists, the method does not; ``allowed`` goes into the header ``Allow``."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.allowed = allowed


class ExpectationFailed(InvalidRequest):
    """The header ``Expect`` asks for something else than 100-continue."""

    status = 417
    code = "expectation_failed"


class InternalError(FlowPrefillError):
    """A bug of ours; the message names the request id under which the log has the traceback."""


def of_http(error: web.HTTPException, request: web.BaseRequest) -> FlowPrefillError:
    """Return our error for one of aiohttp's own."""
    if isinstance(error, web.HTTPNotFound):
        return UnknownRoute(f"{request.method} {request.path}: no such path", param="url")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{request.path}: got {request.method}, expected {allowed}"
        return WrongMethod(message, allowed=allowed, param="method")
    if isinstance(error, web.HTTPExpectationFailed):
        return ExpectationFailed.field("expect", request.headers.get("Expect"), "100-continue")
    return InvalidRequest(f"{request.method} {request.path}: {error.reason}")


def error_body(error: FlowPrefillError) -> dict[str, Any]:
    """Return the OpenAI error object."""
    message = error.json_message if isinstance(error, InvalidRequest) else error.message
    return {
        "error": {
            "message": message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_headers(error: FlowPrefillError) -> dict[str, str]:
    """Return the headers that tell clients how, whether and when to try again."""
    if isinstance(error, Overloaded):
        if math.isinf(error.retry_after_s):
            return {"x-should-retry": "false"}
        seconds = max(error.retry_after_s, 0.001)
        return {
            "Retry-After": str(math.ceil(seconds)),
            "retry-after-ms": str(math.ceil(seconds * 1e3)),
        }
    if isinstance(error, NotReady):
        return {"Retry-After": str(NOT_READY_RETRY_S)}
    if isinstance(error, WrongMethod):
        return {"Allow": error.allowed}
    if error.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, DeadlinePassed):
        # The openai client would send the lost request twice more.
        return {"x-should-retry": "false"}
    return {}


def error_response(error: FlowPrefillError) -> web.Response:
    """Build the whole response for one error."""
    return web.Response(
        status=error.status,
        text=json.dumps(error_body(error)),
        content_type="application/json",
        headers=error_headers(error),
    )
