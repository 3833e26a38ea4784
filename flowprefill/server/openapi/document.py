"""The OpenAPI document of an application's routes, and GET /openapi.json; for app.py."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable
from typing import Any

from aiohttp import web

from flowprefill.errors import FlowPrefillError, Overloaded
from flowprefill.server.context import SERVER
from flowprefill.server.http.errors import REQUEST_ID_HEADER, error_headers
from flowprefill.server.lanes import Lane
from flowprefill.server.openai.openai_schema import METRICS_HEADER
from flowprefill.server.openapi.fields import COMPONENTS, TEXT, Schema, ref
from flowprefill.server.openapi.operations import HTML, JSON, OPERATIONS, Operation
from flowprefill.server.openapi.replies import REPLIES
from flowprefill.server.openapi.requests import EXAMPLES, found_fields, request_schema
from flowprefill.server.slo import CLASS_HEADER, HEADER_PREFIXES, MAX_OBJECTIVE_MS
from flowprefill.version import __version__

Route = tuple[str, str]  # method and path
ABOUT = (
    "OpenAI's API with objectives: a request says when it wants its first token. Fields that a "
    "schema lists under `x-refused` are refused with a 400 unless they have one of the values "
    "there; so are fields that no schema lists, but for some that change no answer, unless the "
    "server runs with `--unknown-fields ignore`. Null counts as not given."
)
_OBJECTIVE: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_OBJECTIVE_MS}


def routes_of(app: web.Application) -> list[Route]:
    """Return the routes of an application; not HEAD, which comes with each GET."""
    return [
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    ]


def openapi_document(routes: Iterable[Route]) -> dict[str, Any]:
    """Return the document of these routes.

    Raises:
        KeyError: a route, or a field that its reader reads, is not described.
    """
    fields = found_fields()
    schemas: dict[str, Schema] = {**REPLIES, **COMPONENTS, "Document": {"type": "object"}}
    paths: dict[str, dict[str, Any]] = {}
    for method, path in sorted(routes, key=_place):
        if path in fields:
            schemas[_body_name(path)] = request_schema(path, fields[path])
        operation = _operation(method, path, OPERATIONS[method, path])
        paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "FlowPrefill", "version": __version__, "description": ABOUT},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _place(route: Route) -> int:
    return list(OPERATIONS).index(route) if route in OPERATIONS else len(OPERATIONS)


def _body_name(path: str) -> str:
    """Return the component of an endpoint's bodies, e.g. ChatCompletionsRequest."""
    words = path.removeprefix("/v1/").strip("/").split("/")
    return "".join(word.capitalize() for word in words) + "Request"


def _operation(method: str, path: str, operation: Operation) -> dict[str, Any]:
    parts = [word.strip("{}") for word in path.replace("-", "/").replace(".", "/").split("/")]
    made: dict[str, Any] = {
        "operationId": "_".join([method.lower(), *filter(None, parts)]) or "page",
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {"200": _success(operation), **_failures(operation)},
    }
    if operation.detail:
        made["description"] = operation.detail
    parameters = _parameters(path, is_generating=bool(operation.event))
    if parameters:
        made["parameters"] = parameters
    if operation.has_key:
        made["security"] = [{}, {"key": []}]
    if path in EXAMPLES:
        examples = {name: {"value": body} for name, body in EXAMPLES[path].items()}
        content = {JSON: {"schema": ref(_body_name(path)), "examples": examples}}
        made["requestBody"] = {"required": True, "content": content}
    return made


def _success(operation: Operation) -> dict[str, Any]:
    schema = ref(operation.reply) if operation.reply else TEXT
    content = {operation.media: {"schema": schema}}
    if operation.event:
        described = {"description": "Events, each with this as JSON in `data`.", **TEXT}
        content["text/event-stream"] = {"schema": {**described, "x-event": ref(operation.event)}}
    kind = "A page." if operation.media == HTML else "Done."
    return {"description": kind, "content": content}


def _failures(operation: Operation) -> dict[str, Any]:
    """Return the errors by status; errors of one status share a description."""
    found: dict[str, list[type[FlowPrefillError]]] = {}
    for error in operation.errors:
        found.setdefault(str(error.status), []).append(error)
    failures = {status: _failure(found[status]) for status in sorted(found)}
    if operation.unready:
        content = {JSON: {"schema": ref(operation.reply)}}
        failures["503"] = {"description": "Not now; `reason` says why.", "content": content}
    return failures


def _failure(errors: list[type[FlowPrefillError]]) -> dict[str, Any]:
    lines = [f"`{error.code}`: {inspect.getdoc(error) or ''}".split("\n")[0] for error in errors]
    names = sorted({name for error in errors for name in error_headers(_sample(error))})
    headers = {name: {"schema": TEXT} for name in (REQUEST_ID_HEADER, *names)}
    content = {JSON: {"schema": ref("Error")}}
    return {"description": "\n\n".join(lines), "headers": headers, "content": content}


def _sample(error: type[FlowPrefillError]) -> FlowPrefillError:
    return Overloaded("", retry_after_s=1) if error is Overloaded else error("")


def _parameters(path: str, *, is_generating: bool) -> list[dict[str, Any]]:
    parameters = []
    if "{id}" in path:
        parameters.append({"name": "id", "in": "path", "required": True, "schema": TEXT})
    if is_generating:
        objectives = [
            f"{prefix}{name}-ms" for prefix in HEADER_PREFIXES for name in ("ttft", "tpot")
        ]
        parameters += [
            _header(name, "An objective, milliseconds.", _OBJECTIVE) for name in objectives
        ]
        parameters += [
            _header(CLASS_HEADER, "A configured service class.", TEXT),
            _header(METRICS_HEADER, "Add `metrics`.", {"enum": ["1", "0", "true", "false"]}),
            _header(REQUEST_ID_HEADER, "Echoed, and named by the log.", TEXT),
        ]
    return parameters


def _header(name: str, meaning: str, schema: Schema) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": meaning, "schema": schema}


@functools.cache
def _text_of(routes: tuple[Route, ...]) -> str:
    return json.dumps(openapi_document(routes))


async def openapi(request: web.Request) -> web.Response:
    """Handle GET /openapi.json: made once, as long as the routes are the same."""
    context, routes = request.app[SERVER], tuple(routes_of(request.app))
    return web.json_response(text=await context.lanes.run(Lane.REPLIES, _text_of, routes))
