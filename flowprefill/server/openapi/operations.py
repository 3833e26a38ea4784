"""What each route does, answers and may fail with; document.py makes OpenAPI operations of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowprefill.errors import (
    DeadlinePassed,
    FlowPrefillError,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    Overloaded,
    ProcessNotStarted,
    PromptTooLong,
    RequestCancelled,
    RequestFailed,
)
from flowprefill.server.context import DebugOff
from flowprefill.server.http.body import UnknownField
from flowprefill.server.http.body_memory import TooManyBodies
from flowprefill.server.http.errors import InternalError
from flowprefill.server.http.guard import HostNotAllowed, OriginNotAllowed
from flowprefill.server.http.incoming import BodyTooLarge, BodyTooSlow, UnsupportedCoding
from flowprefill.server.observe.debug_routes import UnknownRequest
from flowprefill.server.responses.response_store import ResponseNotFound, UnknownResponse
from flowprefill.server.tenants import Unauthorized

Errors = tuple[type[FlowPrefillError], ...]

_ANY: Errors = (HostNotAllowed, InternalError)
_ENGINE: Errors = (HostNotAllowed, NotReady, InternalError)
_BODY: Errors = (
    InvalidRequest, UnknownField, HostNotAllowed, OriginNotAllowed, ModelNotFound, BodyTooSlow,
    BodyTooLarge, UnsupportedCoding, NotReady, TooManyBodies, InternalError,
)  # fmt: skip
_GENERATION: Errors = (
    *_BODY, PromptTooLong, Unauthorized, Overloaded, RequestCancelled, RequestFailed,
    DeadlinePassed, ProcessNotStarted,
)  # fmt: skip
HTML, PROMETHEUS, JSON = "text/html", "text/plain", "application/json"


@dataclass(frozen=True, slots=True)
class Operation:
    """One route.

    Attributes:
        summary: one line.
        reply: the component that a 200 has; empty for a text of the type `media`.
        errors: what it may answer instead.
        event: the component of a stream's events; empty: it does not stream.
        unready: whether a 503 has the same component, not an error object.
        has_key: whether it wants a tenant's key where tenants are configured.
        detail: further sentences.
    """

    summary: str
    reply: str
    errors: Errors = _ANY
    event: str = ""
    unready: bool = False
    has_key: bool = False
    media: str = JSON
    detail: str = ""
    tag: str = "Server"


def _generation(summary: str, reply: str, event: str, *more: type[FlowPrefillError]) -> Operation:
    return Operation(
        summary, reply, (*_GENERATION, *more), event, has_key=True, tag="Generation",
        detail="With `stream` the answer is server-sent events, the first with the first text; an "
        "error after it is an event with an error object, and ends the stream without its mark.",
    )  # fmt: skip


def _debug(summary: str, reply: str, *more: type[FlowPrefillError]) -> Operation:
    errors = (*_ENGINE, DebugOff, Unauthorized, *more)
    return Operation(summary, reply, errors, has_key=True, tag="Looking inside")


OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/v1/completions"): _generation(
        "Complete texts, whole or streamed.", "Completion", "CompletionChunk"
    ),
    ("POST", "/v1/chat/completions"): _generation(
        "Answer a chat, whole or streamed.", "ChatCompletion", "ChatChunk"
    ),
    ("POST", "/v1/responses"): _generation(
        "OpenAI's newer endpoint: a chat that may continue a kept reply.",
        "Response", "ResponseEvent", ResponseNotFound,
    ),
    ("GET", "/v1/responses/{id}"): Operation(
        "A kept reply of `/v1/responses`, as it was sent.", "Response",
        (*_ANY, InvalidRequest, Unauthorized, UnknownResponse), has_key=True, tag="Generation",
    ),
    ("DELETE", "/v1/responses/{id}"): Operation(
        "Forget a kept reply; it can be continued no more.", "ResponseDeleted",
        (*_ANY, OriginNotAllowed, Unauthorized, UnknownResponse), has_key=True, tag="Generation",
    ),
    ("POST", "/v1/embeddings"): Operation(
        "Turn texts into vectors of length 1.", "Embeddings", _GENERATION, has_key=True,
        tag="Generation",
    ),
    ("POST", "/tokenize"): Operation(
        "Turn a prompt, or the messages of a chat, into token ids.", "Tokens",
        (*_BODY, Unauthorized, PromptTooLong, ProcessNotStarted), has_key=True, tag="Generation",
    ),
    ("POST", "/detokenize"): Operation(
        "Turn token ids into text.", "Text", (*_BODY, Unauthorized), has_key=True,
        tag="Generation",
    ),
    ("GET", "/v1/models"): Operation("List what is served.", "ModelList", _ENGINE),
    ("GET", "/v1/models/{id}"): Operation(
        "Describe one model; its id may contain slashes.", "Model", (*_ENGINE, ModelNotFound)
    ),
    ("GET", "/health"): Operation(
        "Whether the process lives.", "Health", unready=True,
        detail="200 also while loading, in a long prefill and while closing; 503 once the engine "
        "has failed: restart it.",
    ),
    ("GET", "/health/ready"): Operation("The same as `/ready`.", "Ready", unready=True),
    ("GET", "/ready"): Operation(
        "Whether requests are taken.", "Ready", unready=True,
        detail="503 with the reason while loading or closing, or once the engine has failed.",
    ),
    ("GET", "/version"): Operation("Version and system fingerprint.", "Version"),
    ("GET", "/load"): Operation("How much is being done.", "Load"),
    ("GET", "/server_info"): Operation(
        "Model, device, and every setting but secrets.", "ServerInfo", _ENGINE
    ),
    ("GET", "/metrics"): Operation("Metrics for Prometheus.", "", media=PROMETHEUS),
    ("GET", "/openapi.json"): Operation("This document.", "Document"),
    ("GET", "/"): Operation(
        "A page for a browser: a chat, and what the executor does.", "", media=HTML,
        tag="Looking inside",
    ),
    ("GET", "/live"): _debug("What the page shows.", "Live"),
    ("GET", "/debug/timeline"): _debug("What the executor ran, as a Chrome trace.", "Trace"),
    ("GET", "/debug/decisions"): _debug("The latest scheduling decisions.", "Decisions"),
    ("GET", "/debug/requests"): _debug("The last 100 requests in short.", "Requests"),
    ("GET", "/debug/requests/{id}"): _debug(
        "What happened to one request and why.", "Story", UnknownRequest
    ),
}  # fmt: skip
