"""Messages of errors: they speak of the body as its client wrote it."""

from __future__ import annotations

from typing import Any

import pytest
from running_server import RunningServer

from flowprefill.server.openai.tokens_routes import OF_CHATS
from flowprefill.server.openapi.requests import found_fields, request_schema

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
CHOICES = (
    """'none', 'auto', 'required', {"type": "function", "name": ...} or """
    """{"type": "allowed_tools", "mode": ..., "tools": [...]}"""
)
A_TOOL = "expected a tool of type 'function' with its name"
CALLABLE = [{"type": "function", "name": "now"}]
TOOLS = [{"type": "function", "function": CALLABLE[0]}]


def among(kind: str, mode: Any, tools: Any) -> dict[str, Any]:
    """Return a choice among tools, of chats or of responses, and the tools there are."""
    subset = {"mode": mode, "tools": tools}
    if kind == CHAT:
        choice = {"type": "allowed_tools", "allowed_tools": subset}
        return {"tools": TOOLS, "tool_choice": choice}
    return {"tools": CALLABLE, "tool_choice": {"type": "allowed_tools", **subset}}


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (CHAT, {"max_completion_tokens": 5, "min_tokens": 9},
         "min_tokens: got 9, expected at most max_completion_tokens = 5"),
        (CHAT, {"max_tokens": 5, "min_tokens": 9},
         "min_tokens: got 9, expected at most max_tokens = 5"),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 6},
         "max_tokens: got 5, expected null, or max_completion_tokens = 6"),
        ("/v1/responses", {"max_output_tokens": 5, "min_tokens": 9},
         "min_tokens: got 9, expected at most max_output_tokens = 5"),
        ("/v1/responses", {"regex": "a", "text": {"format": {"type": "json_object"}}},
         "regex: got it together with text.format, expected one of the two"),
        ("/v1/responses", {"tools": CALLABLE, "tool_choice": {"type": "x"}},
         f"tool_choice: got {{'type': 'x'}}, expected {CHOICES}"),
        (CHAT, among(CHAT, "none", TOOLS),
         "tool_choice.allowed_tools.mode: got 'none', expected 'auto' or 'required'"),
        (CHAT, among(CHAT, "auto", []),
         "tool_choice.allowed_tools.tools: got [], expected a list of 1..128 tools"),
        (CHAT, among(CHAT, "auto", [{"type": "function", "function": {"name": "x"}}]),
         "tool_choice.allowed_tools.tools[0].function.name: got 'x', expected one of: now"),
        (CHAT, among(CHAT, "auto", [*TOOLS, *CALLABLE]),
         "tool_choice.allowed_tools.tools[1]: got {'type': 'function', 'name': 'now'}, " + A_TOOL),
        ("/v1/responses", among("", None, CALLABLE),
         "tool_choice.mode: got null, expected 'auto' or 'required'"),
        ("/v1/responses", among("", "auto", []),
         "tool_choice.tools: got [], expected a list of 1..128 tools"),
        ("/v1/responses", among("", "auto", [*CALLABLE, {"type": "function", "name": 5}]),
         "tool_choice.tools[1]: got {'type': 'function', 'name': 5}, " + A_TOOL),
        (CHAT, {"temperature": True}, "temperature: got true, expected a number in [0, 2]"),
        (CHAT, {"stop": [None]}, "stop[0]: got null, expected a non-empty string"),
        (CHAT, {"use_beam_search": True},
         "use_beam_search: got true, expected null or false: this field is not supported"),
        ("/v1/responses", {"input": [{"role": None}]},
         "input[0].role: got null, expected one of: system, developer, user, assistant, tool"),
    ],
)  # fmt: skip
def test_messages_speak_of_what_was_written(
    server: RunningServer, path: str, fields: dict[str, Any], message: str
) -> None:
    body: dict[str, Any] = {"messages": USER} if path == CHAT else {"input": "a"}
    reply = server.post(path, body | fields)
    assert (reply.status, reply.error["message"]) == (400, message)


def test_a_text_to_tokenise_may_have_each_field_of_a_chat_that_changes_nothing(
    server: RunningServer,
) -> None:
    schema = request_schema("/tokenize", found_fields()["/tokenize"])
    fields = set(schema["properties"]) - {"messages"}
    assert fields >= OF_CHATS.keys()
    plain = server.post("/tokenize", {"prompt": "a"}).json()
    for name in fields - {"prompt", "model", "add_special_tokens", "return_token_strs"}:
        for value in (None, *OF_CHATS[name]):
            assert server.post("/tokenize", {"prompt": "a", name: value}).json() == plain
        reply = server.post("/tokenize", {"prompt": "a", name: ["x"]})
        assert (reply.status, reply.error["param"]) == (400, name)
        assert "a text goes through no chat template" in reply.error["message"]
