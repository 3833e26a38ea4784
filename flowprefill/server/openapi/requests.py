"""JSON schemas of the request bodies, made by running the server's own readers on the examples.

document.py puts them into the document; tests send the examples to a server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flowprefill.config import EngineConfig
from flowprefill.server.http.body import Body
from flowprefill.server.openai.chat import order_of_chat
from flowprefill.server.openai.completions import order_of_completions
from flowprefill.server.openai.embeddings import order_of_embeddings
from flowprefill.server.openai.openai_schema import IGNORED, MAX_INT, SchemaContext
from flowprefill.server.openai.tokens_routes import read_detokenize, read_tokenize
from flowprefill.server.openapi.fields import (
    EMBEDDINGS_SHAPES,
    MEANINGS,
    RESPONSES_SHAPES,
    SHAPES,
    WITHOUT_EFFECT,
    Schema,
    nullable,
)
from flowprefill.server.openapi.recorder import FieldRecorder, Found
from flowprefill.server.options import ServerOptions
from flowprefill.server.responses.response_input import OWN, written_names
from flowprefill.server.responses.response_store import ResponseStore
from flowprefill.server.responses.responses import ResponsesEndpoint

_USER = [{"role": "user", "content": "Why is the sky blue?"}]
_CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "population": {"type": "integer"}},
    "required": ["city", "population"],
}
_WEATHER = {"name": "weather", "description": "The weather of a place.", "parameters": _CITY}

# Path -> name -> a body. Together they hold every field that is an object, so that its own fields
# are read too.
EXAMPLES: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "/v1/completions": {
        "text": {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0},
        "objective": {
            "prompt": ["The capital of France is", "The capital of Peru is"],
            "slo": {"ttft_ms": 250, "tpot_ms": 100, "on_miss": "demote"},
        },
        "streamed": {
            "prompt": "Once upon a time", "stream": True, "stream_options": {"include_usage": True},
        },
        "structured": {"prompt": "A city:", "structured_outputs": {"json": _CITY}},
    },
    "/v1/chat/completions": {
        "chat": {
            "messages": _USER, "max_completion_tokens": 60, "slo": {"ttft_ms": 250, "tpot_ms": 100},
        },
        "streamed": {
            "messages": _USER, "stream": True, "stream_options": {"include_usage": True},
        },
        "structured": {
            "messages": _USER,
            "response_format": {
                "type": "json_schema", "json_schema": {"name": "city", "schema": _CITY},
            },
        },
        "choice": {"messages": _USER, "structured_outputs": {"choice": ["dust", "air"]}},
        "tools": {"messages": _USER, "tools": [{"type": "function", "function": _WEATHER}]},
    },
    "/v1/responses": {
        "text": {"input": "Why is the sky blue?", "max_output_tokens": 60},
        "structured": {
            "input": _USER,
            "text": {"format": {"type": "json_schema", "name": "city", "schema": _CITY}},
            "reasoning": {"effort": "low"},
        },
        "tools": {"input": _USER, "tools": [{"type": "function", **_WEATHER}]},
    },
    "/v1/embeddings": {
        "texts": {"input": ["The cat sleeps.", "A cat is asleep."], "slo": {"ttft_ms": 250}},
        "mean": {"input": [72, 105], "pooling": "mean", "encoding_format": "base64"},
    },
    "/tokenize": {
        "text": {"prompt": "The capital of France is", "return_token_strs": True},
        "chat": {"messages": _USER},
    },
    "/detokenize": {"tokens": {"tokens": [72, 105]}},
}  # fmt: skip
REQUIRED = {
    "/v1/completions": ["prompt"],
    "/v1/chat/completions": ["messages"],
    "/v1/responses": ["input"],
    "/v1/embeddings": ["input"],
    "/tokenize": [],  # one of two
    "/detokenize": ["tokens"],
}


def _record(path: str, read: Callable[[Body], object]) -> Found:
    """Return what a reader reads of an endpoint's examples."""
    found = Found()
    for body in EXAMPLES[path].values():
        read(FieldRecorder(body, found=found))
    return found


def found_fields() -> dict[str, Found]:
    """Return the fields of each endpoint as its readers know them."""
    context = SchemaContext({}, EngineConfig(), {}, vocab_size=MAX_INT)
    choices = ServerOptions().max_choices
    responses = ResponsesEndpoint(ResponseStore(0))
    found = {
        "/v1/completions": _record(
            "/v1/completions", lambda body: order_of_completions(body, context, choices)
        ),
        "/v1/chat/completions": _record(
            "/v1/chat/completions", lambda body: order_of_chat(body, context, choices)
        ),
        "/v1/embeddings": _record(
            "/v1/embeddings", lambda body: order_of_embeddings(body, context, choices)
        ),
        "/tokenize": _record(
            "/tokenize", lambda body: (body.text("model"), read_tokenize(body, ""))
        ),
        "/detokenize": _record(
            "/detokenize", lambda body: (body.text("model"), read_detokenize(body, MAX_INT))
        ),
    }
    own = _record("/v1/responses", lambda body: responses.order(body, context, choices))
    found["/v1/responses"] = _with_chat(own, found["/v1/chat/completions"])
    return found


def _with_chat(own: Found, chat: Found) -> Found:
    """Add to the fields of /v1/responses those that go on to the chat under their own names."""
    merged = Found(refused={n: v for n, v in chat.refused.items() if n not in OWN} | own.refused)
    for name, schema in chat.schemas.items():
        if name not in OWN:
            merged.schemas[name] = {**schema, **own.schemas.get(name, {})}
            if name in chat.inner:
                merged.inner[name] = chat.inner[name]
    for name in OWN:
        if name not in own.refused:
            merged.schemas[name] = own.schemas[name]
    merged.inner |= {name: inner for name, inner in own.inner.items() if name in OWN}
    for theirs, ours in written_names({}).items():
        if "type" in chat.schemas.get(theirs, {}) and ours in merged.schemas:
            merged.schemas[ours] = {**chat.schemas[theirs], **merged.schemas[ours]}
    return merged


def request_schema(path: str, found: Found) -> Schema:
    """Return the schema of an endpoint's bodies.

    Fields that are refused unless neutral stand apart, in ``x-refused``, with their neutral values:
    no client should offer them.

    Raises:
        KeyError: a field is not in fields.py.
    """
    own = {"/v1/responses": RESPONSES_SHAPES, "/v1/embeddings": EMBEDDINGS_SHAPES}
    shapes = {**SHAPES, **own.get(path, {})}
    required = REQUIRED[path]
    schema = _object_schema(found, shapes, required)
    if found.refused:
        neutral = {name: [None, *values] for name, values in sorted(found.refused.items())}
        schema["x-refused"] = neutral
    return schema


def _object_schema(
    found: Found, shapes: Mapping[str, Schema], required: list[str], prefix: str = ""
) -> Schema:
    properties: dict[str, Schema] = {}
    for name in sorted(found.schemas, key=lambda one: (one not in required, one)):
        described = _property(found, name, shapes, prefix)
        properties[name] = described if name in required else nullable(described)
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    if found.is_closed:
        for name, values in found.refused.items():
            properties[name] = {"description": "Not supported.", "enum": [None, *values]}
        schema["additionalProperties"] = False
    return schema


def _property(found: Found, name: str, shapes: Mapping[str, Schema], prefix: str) -> Schema:
    whole = prefix + name
    if not prefix and name in IGNORED and "type" not in found.schemas[name]:
        return {"description": WITHOUT_EFFECT}
    schema = {"description": MEANINGS[whole], **found.schemas[name], **shapes.get(whole, {})}
    if name in found.inner:
        inner = _object_schema(found.inner[name], shapes, [], f"{whole}.")
        schema = {**inner, **schema}
    elif set(schema) <= {"description", "default"} and MEANINGS[whole] != WITHOUT_EFFECT:
        raise KeyError(f"{whole}: its shape is neither read by type nor in SHAPES")
    return schema
