"""Bodies of POST /v1/responses as chat bodies: input items to messages, flat tools to nested ones.

Called by responses.py, which hands the result to chat.py: both endpoints check the same fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowprefill.errors import InvalidRequest
from flowprefill.server.http.body import Body

MAX_ITEMS = 10_000
# Anything but a neutral value is refused.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "background": (False,), "conversation": (), "include": ([],), "max_tool_calls": (),
    "prompt": (), "truncation": ("disabled",), "top_logprobs": (0,), "n": (1,), "logprobs": (),
    "stream_options": ({}, {"include_obfuscation": False}, {"include_obfuscation": True}),
    "prompt_logprobs": (), "messages": (), "response_format": (), "max_tokens": (),
    "max_completion_tokens": (), "access_programs": (), "background_options": ({},),
    "context_management": ([],), "image": (),
}  # fmt: skip
OWN = (
    "input", "instructions", "max_output_tokens", "previous_response_id", "reasoning", "store",
    "text", "tool_choice", "tools", *REFUSED,
)  # fmt: skip
# Field of the chat body -> what its caller wrote; for errors.
RENAMED = {
    "messages": "input", "response_format": "text.format", "max_completion_tokens":
    "max_output_tokens", "reasoning_effort": "reasoning.effort", "verbosity": "text.verbosity",
}  # fmt: skip
REASONING_OFF: Mapping[str, tuple[Any, ...]] = {
    "context": ("auto",), "mode": ("standard",), "max_tokens": (), "exclude": (False,),
    "enabled": (True,),
}  # fmt: skip
# How reasoning is told besides its text, which is always told.
SUMMARIES = ("summary", "generate_summary")
FORMAT_MEMBERS = ("type", "name", "description", "schema", "strict")
PART_TYPES = ("input_text", "output_text", "text", "refusal")


def renamed(error: InvalidRequest) -> InvalidRequest:
    """Return an error about a chat body in the words of the body that it was made from."""
    name = next((n for n in RENAMED if error.param and error.param.startswith(n)), None)
    if name is None or error.param is None:
        return error
    message = error.message.replace(name, RENAMED[name], 1)
    return type(error)(message, param=error.param.replace(name, RENAMED[name], 1))


def chat_fields(body: Body, fields: Mapping[str, Any], messages: Any) -> dict[str, Any]:
    """Return the chat body.

    Args:
        body: to read the fields of this endpoint's own from.
        fields: the whole body; what is not this endpoint's own goes through as it is.
        messages: the chat.
    """
    chat = {name: value for name, value in fields.items() if name not in OWN}
    chat["messages"] = messages
    chat["max_completion_tokens"] = body.raw("max_output_tokens")
    chat["tools"] = [_nested_tool(body, tool) for tool in body.listed("tools", 128, "tools")]
    choice = body.raw("tool_choice")
    if isinstance(choice, dict) and "function" not in choice:
        choice = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
    chat["tool_choice"] = choice
    text = body.object("text")
    if text is not None:
        chat["verbosity"] = text.raw("verbosity")
        chat["response_format"] = _nested_format(text.raw("format"))
        text.accept_in("format", FORMAT_MEMBERS)
    inner = body.object("reasoning")
    if inner is not None:
        inner.only_neutral(REASONING_OFF)
        inner.accept(SUMMARIES)
        if inner.raw("effort") is not None:
            chat["reasoning_effort"] = inner.raw("effort")
    return chat


def _nested_tool(body: Body, tool: Any) -> Any:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        body.refuse("tools", tool, "tools of type 'function'")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _nested_format(form: Any) -> Any:
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {k: form[k] for k in form if k != "type"}}
    return form


def input_messages(body: Body) -> list[dict[str, Any]]:
    """Read ``input``: a text, or a list of messages, calls and their results."""
    given = body.raw("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_ITEMS:
        body.refuse("input", given, f"a text or a list of 1..{MAX_ITEMS} items")
    messages: list[dict[str, Any]] = []
    thought = ""
    for index, item in enumerate(given):
        if isinstance(item, dict) and item.get("type") == "reasoning":
            thought += _thought(f"input[{index}].content", item.get("content"))
            continue
        _add_item(f"input[{index}]", item, messages)
        if thought and messages[-1].get("role") == "assistant":
            messages[-1].setdefault("reasoning_content", thought)
        thought = ""
    return messages


def _thought(param: str, content: Any) -> str:
    """Read what the model thought before its next message; older than that it goes unread."""
    if content is None:
        return ""
    if not isinstance(content, list):
        raise InvalidRequest.field(param, content, "a list of parts of reasoning text")
    for index, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise InvalidRequest.field(f"{param}[{index}]", part, "a part of reasoning text")
    return "".join(part["text"] for part in content)


def _add_item(param: str, item: Any, messages: list[dict[str, Any]]) -> None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message":
        messages.append({"role": item.get("role"), "content": _content(param, item.get("content"))})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        last = messages[-1] if messages else {}
        if last.get("role") == "assistant":
            messages[-1] = {**last, "tool_calls": [*last.get("tool_calls", ()), call]}
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        content = _content(f"{param}.output", item.get("output"))
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    else:
        allowed = "a message, function_call, function_call_output or reasoning"
        raise InvalidRequest.field(param, item, allowed)


def _content(param: str, content: Any) -> Any:
    """Return content as chats have it."""
    if not isinstance(content, list):
        return content
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in PART_TYPES:
            raise InvalidRequest.field(f"{param}[{index}]", part, "a part that is text")
        parts.append({"type": "text", "text": part.get("text", part.get("refusal"))})
    return parts
