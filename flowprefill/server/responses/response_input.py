"""Bodies of POST /v1/responses as chat bodies: input items to messages, flat tools to nested ones.

Called by responses.py, which hands the result to chat.py: both endpoints check the same fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowprefill.errors import InvalidRequest
from flowprefill.server.http.body import Body
from flowprefill.server.openai.tools import MAX_TOOLS, refuse_choice

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
# Field of the chat body, or of the engine's request -> what its caller wrote; for errors.
NAMES = {
    "messages": "input", "prompt": "input", "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens", "response_format": "text.format",
    "response_format.json_schema": "text.format",
}  # fmt: skip
# Fields that may also stand inside an object of this endpoint's own.
INNER = {"reasoning_effort": ("reasoning", "effort"), "verbosity": ("text", "verbosity")}
REASONING_OFF: Mapping[str, tuple[Any, ...]] = {
    "context": ("auto",), "mode": ("standard",), "max_tokens": (), "exclude": (False,),
    "enabled": (True,),
}  # fmt: skip
# How reasoning is told besides its text, which is always told.
SUMMARIES = ("summary", "generate_summary")
FORMAT_MEMBERS = ("type", "name", "description", "schema", "strict")
CHOICE_FORMS = (
    '{"type": "function", "name": ...}',
    '{"type": "allowed_tools", "mode": ..., "tools": [...]}',
)
PART_TYPES = ("input_text", "output_text", "text", "refusal")


def written_names(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return what a body calls fields of the chat body that is made from it; see as_written."""
    names = dict(NAMES)
    for name, (outer, inner) in INNER.items():
        if fields.get(name) is None:
            names[name] = f"{outer}.{inner}"
    for index, _ in enumerate(fields.get("tools") or ()):
        names[f"tools[{index}].function"] = f"tools[{index}]"
    choice = fields.get("tool_choice")
    if isinstance(choice, dict) and "function" not in choice:
        names["tool_choice.function"] = "tool_choice"
    if isinstance(choice, dict) and "allowed_tools" not in choice:
        names["tool_choice.allowed_tools"] = "tool_choice"
        tools = choice.get("tools")
        for index in range(min(len(tools), MAX_TOOLS) if isinstance(tools, list) else 0):
            where = f"tool_choice.allowed_tools.tools[{index}]"
            names |= {f"{where}.function": f"tool_choice.tools[{index}]"}
    return names


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
    tools = body.listed("tools", MAX_TOOLS, "tools")
    chat["tools"] = [_nested_tool(body, index, tool) for index, tool in enumerate(tools)]
    chat["tool_choice"] = _nested_choice(body, body.raw("tool_choice"))
    text = body.object("text")
    if text is not None:
        _take_inner(body, chat, "verbosity", text.raw("verbosity"))
        chat["response_format"] = _nested_format(text.raw("format"))
        text.accept_in("format", FORMAT_MEMBERS)
    inner = body.object("reasoning")
    if inner is not None:
        inner.only_neutral(REASONING_OFF)
        inner.accept(SUMMARIES)
        _take_inner(body, chat, "reasoning_effort", inner.raw("effort"))
    return chat


def _take_inner(body: Body, chat: dict[str, Any], name: str, value: Any) -> None:
    """Put a field into the chat that stands inside an object; both places may agree on it."""
    (outer, member), given = INNER[name], chat.get(name)
    if value is None:
        return
    if given is not None and given != value:
        body.refuse(name, given, f"null, or {outer}.{member} = {value!r}")
    chat[name] = value


def _nested_choice(body: Body, choice: Any) -> Any:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if choice in (None, "none", "auto", "required"):
        return choice
    if kind == "function" and ("function" in choice or isinstance(choice.get("name"), str)):
        return _nested_function(choice)
    if kind != "allowed_tools":
        refuse_choice(body, choice, CHOICE_FORMS)
    if "allowed_tools" in choice:
        return choice
    tools = choice.get("tools")
    if isinstance(tools, list):
        tools = [_nested_function(tool) for tool in tools]
    return {"type": kind, "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}


def _nested_function(tool: Any) -> Any:
    """Return a tool that is named flat as chats name it; anything else as it is."""
    if not isinstance(tool, dict) or "function" in tool or not isinstance(tool.get("name"), str):
        return tool
    return {"type": tool.get("type"), "function": {"name": tool["name"]}}


def _nested_tool(body: Body, index: int, tool: Any) -> Any:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        body.refuse(f"tools[{index}]", tool, "a tool of type 'function'")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _nested_format(form: Any) -> Any:
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {k: form[k] for k in form if k != "type"}}
    return form


def input_messages(body: Body, earlier: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Read ``input``: a text, or a list of messages, calls and their results.

    Args:
        earlier: how many messages come before these in the chat.

    Returns:
        The messages, and what the body calls each of them and their parts; see as_written.
    """
    given = body.raw("input")
    if isinstance(given, str):
        where = f"messages[{earlier}]"
        return [{"role": "user", "content": given}], {where: "input", f"{where}.content": "input"}
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_ITEMS:
        body.refuse("input", given, f"a text or a list of 1..{MAX_ITEMS} items")
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    thought = ""
    for index, item in enumerate(given):
        if isinstance(item, dict) and item.get("type") == "reasoning":
            thought += _thought(f"input[{index}].content", item.get("content"))
            continue
        _add_item(f"input[{index}]", item, messages)
        _add_names(
            f"input[{index}]", f"messages[{earlier + len(messages) - 1}]", messages[-1], names
        )
        if thought and messages[-1].get("role") == "assistant":
            messages[-1].setdefault("reasoning_content", thought)
        thought = ""
    return messages, names


def _add_names(param: str, where: str, message: Mapping[str, Any], names: dict[str, str]) -> None:
    """Tell where an item went: it is the last message, or the last call of it."""
    calls = message.get("tool_calls")
    if calls:
        call = f"{where}.tool_calls[{len(calls) - 1}]"
        names |= {call: param, f"{call}.function": param, f"{call}.id": f"{param}.call_id"}
    elif message.get("role") == "tool":
        names |= {f"{where}.content": f"{param}.output"}
        names |= {f"{where}.tool_call_id": f"{param}.call_id"}
    names.setdefault(where, param)


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
