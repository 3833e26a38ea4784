"""The OpenAPI document: whole, valid, and true of a running server."""

from __future__ import annotations

import ast
import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fake_engine import FakeEngine, Script
from openapi_spec_validator import OpenAPIV31SpecValidator
from running_server import RunningServer, StartServer

import flowprefill.server
from flowprefill.config import EngineConfig
from flowprefill.errors import FlowPrefillError
from flowprefill.server.app import create_app
from flowprefill.server.openai.foreign_fields import (
    FOREIGN,
    NOT_OF_CHAT,
    NOT_OF_COMPLETIONS,
    NOT_OF_EMBEDDINGS,
)
from flowprefill.server.openai.openai_schema import CHAT_ONLY, IGNORED, REFUSED
from flowprefill.server.openai.structured_fields import NESTED, NESTED_OFF, TOP_LEVEL
from flowprefill.server.openapi.document import openapi_document, routes_of
from flowprefill.server.openapi.operations import OPERATIONS
from flowprefill.server.openapi.recorder import FieldRecorder
from flowprefill.server.openapi.requests import EXAMPLES
from flowprefill.server.responses import response_input, responses

SERVER = Path(flowprefill.server.__file__).parent
DOCUMENT = openapi_document(routes_of(create_app(None)))
BODIES = {path: next(iter(examples.values())) for path, examples in EXAMPLES.items()}
GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


def test_document_is_served_and_valid(server: RunningServer) -> None:
    reply = server.get("/openapi.json")
    assert reply.status == 200
    assert reply.json() == DOCUMENT
    OpenAPIV31SpecValidator(reply.json()).validate()
    assert server.post("/openapi.json", {}).status == 405


def test_every_route_is_in_it_and_no_other(engine: FakeEngine, start_server: StartServer) -> None:
    routes = {(method, path) for method, path in routes_of(create_app(None)) if method != "*"}
    written = {
        (method.upper(), path) for path, made in DOCUMENT["paths"].items() for method in made
    }
    assert written == routes == set(OPERATIONS)
    bare = start_server(engine, page=False).get("/openapi.json").json()
    left_out = set(DOCUMENT["paths"]) - set(bare["paths"])
    assert left_out == {"/", "/live"}


def test_route_that_nobody_described_is_an_error() -> None:
    with pytest.raises(KeyError, match="/v1/new"):
        openapi_document([("GET", "/v1/new")])


EVERY_EXAMPLE = [(path, name) for path, examples in EXAMPLES.items() for name in examples]


@pytest.mark.parametrize(("path", "name"), EVERY_EXAMPLE)
def test_example_fits_its_schema_and_is_accepted(
    server: RunningServer, path: str, name: str
) -> None:
    body = EXAMPLES[path][name]
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    assert content["examples"][name] == {"value": body}
    assert errors_of(content["schema"], body) == []
    assert server.post(path, body).status == 200


# ---- fields


def test_every_field_that_a_reader_names_is_in_it_and_no_other() -> None:
    # The readers' own text, not what the recorder made of it: calls that read a field by name, and
    # the tables.
    named = set(fields_named_in_sources())
    tables = {*IGNORED, *TOP_LEVEL, *NESTED, *NESTED_OFF, *REFUSED, *FOREIGN, *CHAT_ONLY}
    tables |= {*NOT_OF_CHAT, *NOT_OF_COMPLETIONS, *NOT_OF_EMBEDDINGS}
    tables |= {*response_input.REFUSED, *responses.SHOWN}
    tables |= {"ttft_ms", "tpot_ms"}  # read by a name that is put together
    written: set[str] = set()
    for path in EXAMPLES:
        written |= names_in(request_schema_of(path))
    assert written == named | tables


def fields_named_in_sources() -> Iterator[str]:
    calls = ("raw", "text", "boolean", "integer", "number", "listed", "object")
    readers = ("body", "form", "inner", "options", "field", "text", "chat")
    files = [*(SERVER / "openai").glob("*.py"), *(SERVER / "responses").glob("*.py")]
    for file in [*files, SERVER / "slo.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner, first = node.func.value, node.args[0] if node.args else None
            is_reader = isinstance(owner, ast.Name) and owner.id in readers
            if is_reader and node.func.attr in calls and isinstance(first, ast.Constant):
                yield str(first.value)


def request_schema_of(path: str) -> dict[str, Any]:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = DOCUMENT["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
    return dict(schema)


# Objects whose members their reader takes as they are: no field is read of them by name.
WHOLE = ("tool_choice", "text.format")


def names_in(schema: dict[str, Any], prefix: str = "") -> set[str]:
    names = set(schema.get("x-refused", ()))
    for name, inner in schema.get("properties", {}).items():
        names.add(name)
        if f"{prefix}{name}" not in WHOLE:
            names |= names_in(inner, f"{prefix}{name}.")
    return names


def test_a_field_without_a_description_stops_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    def raw(self: FieldRecorder, name: str, default: Any = None) -> Any:
        self.found.note("colour", {"type": "string"})
        return None

    monkeypatch.setattr(FieldRecorder, "refuse_unknown", lambda self, _: raw(self, "colour"))
    with pytest.raises(KeyError, match="colour"):
        openapi_document(OPERATIONS)


def simple_fields() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each field with a range or of truth, and its schema."""
    for path in EXAMPLES:
        for name, schema in request_schema_of(path)["properties"].items():
            if {"boolean", "integer", "number"} & set(schema.get("type", ())):
                yield path, name, schema


# Bodies in which every such field counts, and what a single field needs besides.
RANGED = {
    **BODIES,
    "/v1/completions": {"prompt": "a", "max_tokens": 2**31 - 1},
    "/tokenize": EXAMPLES["/tokenize"]["chat"],
}
ASSISTANT = [{"role": "assistant", "content": "I"}]


def needed(path: str, name: str) -> dict[str, Any]:
    if name == "continue_final_message":
        return {"input" if path == "/v1/responses" else "messages": ASSISTANT}
    if name in ("min_tokens", "max_tokens"):
        shown = {"echo": True} if path == "/v1/completions" else {}  # then it may be 0
        return {"max_completion_tokens": None, "max_output_tokens": None, **shown}
    return {"logprobs": True} if name == "top_logprobs" else {}


ONE_VALUE = {"best_of": 1, "n": 2}


@pytest.mark.parametrize(
    ("path", "name", "schema"),
    [pytest.param(*one, id=f"{one[0]}-{one[1]}") for one in simple_fields()],
)
def test_range_is_the_servers(
    server: RunningServer, path: str, name: str, schema: dict[str, Any]
) -> None:
    def status(value: Any) -> int:
        reply = server.post(path, {**RANGED[path], **needed(path, name), name: value})
        assert reply.status == 200 or reply.error["param"] == name
        return reply.status

    good, bad = values_of(name, schema)
    assert [value for value in good if status(value) != 200] == []
    assert [value for value in bad if status(value) != 400] == []


def values_of(name: str, schema: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return values at and within the schema's bounds, and values outside."""
    if "boolean" in schema["type"]:
        return [None, True, False, schema["default"]], ["true", 1]
    high, low = schema["maximum"], schema.get("minimum")
    if name in ONE_VALUE:
        return [None, ONE_VALUE[name]], [low - 1, high + 1, "1", True]
    if low is None:
        return [None, high, 1e-9], [schema["exclusiveMinimum"], high * 1.001, "1", True]
    return [None, low, high, schema.get("default")], [low - 1, high + 1, "1", True]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_tool_choice_is_as_described(server: RunningServer, path: str) -> None:
    flat = {"type": "function", "name": "weather"}
    nested = {"type": "function", "function": {"name": "weather"}}
    subsets = [
        {"mode": mode, "tools": [one]} for mode in ("auto", "none") for one in (flat, nested)
    ]
    subsets += [{"mode": "required", "tools": []}, {"tools": [flat]}, {"mode": "auto"}, {}]
    choices: list[Any] = [flat, nested, "any", {}]
    choices += [{"type": "allowed_tools", "allowed_tools": subset} for subset in subsets]
    choices += [{"type": "allowed_tools", **subset} for subset in subsets]
    accepted = []
    for choice in choices:
        body = {**EXAMPLES[path]["tools"], "tool_choice": choice}
        accepted.append(server.post(path, body).status == 200)
        assert accepted[-1] == (errors_of(request_schema_of(path), body) == []), choice
    assert sum(accepted) == (5 if path == "/v1/responses" else 2)


@pytest.mark.parametrize("path", EXAMPLES)
def test_required_fields_are_required(server: RunningServer, path: str) -> None:
    required = request_schema_of(path).get("required", [])
    for name in required:
        body = {key: value for key, value in BODIES[path].items() if key != name}
        reply = server.post(path, body)
        assert (reply.status, reply.error["param"]) == (400, name)
    assert required or path == "/tokenize"


# ---- replies


def strict(schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the components so that a reply may have no field that is not described."""

    def close(schema: Any) -> None:
        if isinstance(schema, dict):
            if "properties" in schema and "required" in schema:
                schema.setdefault("additionalProperties", False)
            for inner in schema.values():
                close(inner)
        elif isinstance(schema, list):
            for inner in schema:
                close(inner)

    closed = copy.deepcopy(schemas)
    close(closed)
    return closed


STRICT = {"components": {"schemas": strict(DOCUMENT["components"]["schemas"])}}


def errors_of(schema: dict[str, Any], value: Any, root: Any = None) -> list[str]:
    root = {"components": DOCUMENT["components"]} if root is None else root
    validator = jsonschema.Draft202012Validator({**root, **schema})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def reply_errors(path: str, status: int, value: Any, method: str = "post") -> list[str]:
    content = DOCUMENT["paths"][path][method]["responses"][str(status)]["content"]
    return errors_of(content["application/json"]["schema"], value, STRICT)


ASKING = {
    "/v1/completions": [
        {}, {"logprobs": 2, "n": 2, "return_metrics": True, "return_token_ids": True},
    ],
    "/v1/chat/completions": [
        {},
        {"logprobs": True, "top_logprobs": 2, "n": 2, "return_metrics": True},
        {"service_tier": "flex", "return_token_ids": True, "slo": {"ttft_ms": 50}},
        {"tools": EXAMPLES["/v1/chat/completions"]["tools"]["tools"]},
    ],
    "/v1/responses": [
        {}, {"instructions": "Be brief.", "return_metrics": True, "max_output_tokens": 3},
        {"tools": EXAMPLES["/v1/responses"]["tools"]["tools"]},
    ],
}  # fmt: skip
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Lima"}}</tool_call>'
ASKED = [(path, extra) for path, several in ASKING.items() for extra in several]


@pytest.fixture
def talking(start_server: StartServer) -> RunningServer:
    """A server whose model thinks, and calls a tool if it is given any."""
    engine = FakeEngine(EngineConfig(classes={"chat": {"ttft_ms": 5}}))
    engine.script = Script(f"<think>Hm.</think>Well. {CALL}")
    return start_server(
        engine, reasoning_parser="think", tool_call_parser="hermes", service_tiers={"flex": "chat"}
    )


@pytest.mark.parametrize(("path", "extra"), ASKED)
def test_whole_reply_is_as_described(
    talking: RunningServer, path: str, extra: dict[str, Any]
) -> None:
    reply = talking.post(path, {**BODIES[path], "max_tokens": None, **extra})
    assert reply.status == 200, reply.body
    assert reply_errors(path, 200, reply.json()) == []


@pytest.mark.parametrize(("path", "extra"), ASKED)
def test_events_are_as_described(talking: RunningServer, path: str, extra: dict[str, Any]) -> None:
    options = {"include_usage": True} if path != "/v1/responses" else None
    body = {**BODIES[path], **extra, "stream": True, "stream_options": options}
    reply = talking.post(path, body)
    assert reply.status == 200, reply.body
    lines = re.findall(r"^data: (\{.*)$", reply.body.decode(), re.MULTILINE)
    events = [json.loads(line) for line in lines]
    content = DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]
    schema = content["text/event-stream"]["schema"]["x-event"]
    assert len(events) > 2
    assert [error for event in events for error in errors_of(schema, event, STRICT)] == []


def test_replies_of_the_other_routes_are_as_described(server: RunningServer) -> None:
    server.post("/v1/completions", {"prompt": "a", "slo": {"ttft_ms": 50}})
    made = server.post("/v1/responses", BODIES["/v1/responses"]).json()["id"]
    known = {
        "/v1/models/{id}": "fake-model",
        "/debug/requests/{id}": "no-such-request",
        "/v1/responses/{id}": made,
    }
    looked = 0
    for (method, path), operation in OPERATIONS.items():
        if method in ("GET", "DELETE"):
            reply = server.request(method, path.replace("{id}", known.get(path, "")))
            if operation.media == "application/json":
                looked += 1
                assert reply_errors(path, reply.status, reply.json(), method.lower()) == [], path
            assert reply.headers["Content-Type"].startswith(operation.media)
    assert looked > 10
    for path in ("/tokenize", "/detokenize"):
        for body in EXAMPLES[path].values():
            reply = server.post(path, body)
            assert reply_errors(path, reply.status, reply.json()) == []


def test_routes_without_an_engine_answer_as_described(start_server: StartServer) -> None:
    server = start_server(None)
    for (method, path), operation in OPERATIONS.items():
        body = BODIES[path] if method == "POST" else None
        reply = server.request(method, path, body)
        if operation.media == "application/json":
            assert reply_errors(path, reply.status, reply.json(), method.lower()) == [], path


def test_every_error_of_a_request_is_in_it_with_its_code() -> None:
    errors = [FlowPrefillError]
    for error in errors:
        errors.extend(error.__subclasses__())
    codes = {error.code for error in errors if error.__module__.startswith("flowprefill")}
    # Of the start, of paths and methods that are not in the document, of HTTP itself.
    codes -= {"bad_config", "bad_checkpoint", "unknown_url", "method_not_allowed"}
    codes -= {"expectation_failed"}
    text = json.dumps(DOCUMENT["paths"])
    assert [code for code in sorted(codes) if f"`{code}`" not in text] == []
    for path in GENERATING:
        answers = DOCUMENT["paths"][path]["post"]["responses"]
        assert {"400", "401", "404", "408", "413", "415", "429", "499", "500", "503", "504"} < set(
            answers
        )
        assert "Retry-After" in answers["429"]["headers"]
