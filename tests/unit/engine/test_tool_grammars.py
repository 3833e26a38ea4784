"""Enforced tool calls: what the grammar lets through is what the parser reads, in every format."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from schema_generator import PieceTokenizer
from test_structured_suite import generate

from flowprefill.engine.grammars import Grammars
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
