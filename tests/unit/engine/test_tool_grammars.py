"""Enforced tool calls: what the grammar lets through is what the parser reads, in every format."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from schema_generator import PieceTokenizer
from test_structured_suite import generate

from flowprefill import InvalidRequest
from flowprefill.engine.grammars import Grammars
from flowprefill.request import MAX_STRUCTURED_CHARS
from flowprefill.server.openai.message import MessagePart
from flowprefill.server.openai.tool_parsers import FORMATS, ToolCalls
from flowprefill.server.openai.tools import Tools, call_grammar

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"enum": [1, 2]}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "pattern": "^[a-z]{1,5}$"}},
}
LISTED: tuple[dict[str, Any], ...] = (
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
)


class Marks(PieceTokenizer):
    def token_id(self, text: str) -> int | None:
        return None


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_enforced_calls_are_read_back(
    grammars: Grammars, form: str, is_parallel: bool, choice: str
) -> None:
    names = ("weather", "now") if choice == "required" else ("weather",)
    tools = Tools(LISTED, choice, names, is_parallel)
    wanted = call_grammar(tools, FORMATS[form], Marks(), "")  # type: ignore[arg-type]
    counts, finished = set(), 0
    for seed in range(20):
        text, has_ended = generate(grammars, wanted, seed)
        if not has_ended:
            continue
        finished += 1
        parser = ToolCalls(FORMATS[form], names, tools.max_calls)
        message = MessagePart()
        message.add(parser.push(text))
        message.add(parser.finish())
        assert message.content.strip() == "", text
        for call in message.calls:
            assert call.name in names
            arguments = json.loads(call.arguments)
            jsonschema.validate(arguments, CITY if call.name == "weather" else {"maxProperties": 0})
        counts.add(len(message.calls))
    assert finished > 12
    assert counts == {1} if tools.max_calls == 1 else max(counts) > 1


A = {"properties": {"a": {"type": "null"}}, "required": ["a"]}


@pytest.mark.parametrize(
    "parameters",
    [
        A,
        {"type": ["object", "null"], **A},
        {"$ref": "#/$defs/a", "$defs": {"a": A}},
        {"anyOf": [A, {"type": "string"}]},
        {"description": "of any kind"},
        {"additionalProperties": False},
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_arguments_are_objects_also_where_their_schema_does_not_say_so(
    grammars: Grammars, form: str, parameters: dict[str, Any]
) -> None:
    tools = Tools(({"type": "function", "function": {"name": "f", "parameters": parameters}},),
                  "named", ("f",))  # fmt: skip
    wanted = call_grammar(tools, FORMATS[form], Marks(), "")  # type: ignore[arg-type]
    for seed in range(8):
        text, has_ended = generate(grammars, wanted, seed)
        message = ToolCalls(FORMATS[form], ("f",), 1).push(text)
        if has_ended:
            arguments = json.loads(message.calls[0].arguments)
            jsonschema.validate(arguments, {**parameters, "type": "object"})


@pytest.mark.parametrize("kind", ["string", ["array", "null"]])
def test_arguments_that_cannot_be_an_object_are_refused_by_name(kind: Any) -> None:
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"type": kind}}}
    tools = Tools((*LISTED, bad), "required", ("weather", "bad"))
    with pytest.raises(InvalidRequest) as caught:
        call_grammar(tools, FORMATS["hermes"], Marks(), "")  # type: ignore[arg-type]
    assert caught.value.param == "tools[2].function.parameters.type"


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"type": "text"}, "Invalid type: text"),
        ({"properties": {"a": {"pattern": "("}}}, "invalid regular expression: unclosed group"),
        ({"$ref": "#/x"}, "Pointer '/x' does not exist"),
        ({"required": "x"}, "Expected array for 'required', got \"x\""),
    ],
)
@pytest.mark.parametrize("names", [("weather", "now", "bad"), ("bad",)])
def test_a_bad_schema_is_named_by_its_tool_and_shows_no_grammar(
    grammars: Grammars, parameters: dict[str, Any], why: str, names: tuple[str, ...]
) -> None:
    bad = {"type": "function", "function": {"name": "bad", "parameters": parameters}}
    tools = Tools((*LISTED, bad), "required", names)
    wanted = call_grammar(tools, FORMATS["hermes"], Marks(), "")  # type: ignore[arg-type]
    param = "tools[2].function.parameters"
    for _ in range(2):  # the second error is one that was kept
        with pytest.raises(InvalidRequest) as caught:
            grammars.compile(wanted)
        assert (caught.value.param, caught.value.message) == (param, f"{param}: {why}")


def test_schemas_that_are_too_long_together_show_no_grammar() -> None:
    parameters = {"enum": ["x" * MAX_STRUCTURED_CHARS]}
    long = {"type": "function", "function": {"name": "long", "parameters": parameters}}
    with pytest.raises(InvalidRequest, match="tools: their parameters are too long") as caught:
        call_grammar(Tools((long,), "named", ("long",)), FORMATS["hermes"], Marks(), "")  # type: ignore[arg-type]
    assert caught.value.param == "tools"
