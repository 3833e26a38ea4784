"""Tools of a chat request: reads ``tools`` and ``tool_choice``, and tool calls in the history.

Also writes what a model that must call a tool may generate, as a grammar. Called by chat.py.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from flowprefill.engine.closed_schema import close_objects
from flowprefill.errors import InvalidRequest
from flowprefill.models.chat_template import content_text
from flowprefill.request import MAX_STRUCTURED_CHARS, StructuredOutput
from flowprefill.server.engine_protocol import ServedTokenizer
from flowprefill.server.http.body import Body, check_text
from flowprefill.server.http.json_text import check_depth
from flowprefill.server.openai.tool_parsers import CallFormat

MAX_TOOLS = 128
MAX_CALLS = 128  # of one message
TOOL_NAME = r"[A-Za-z0-9_.-]{1,128}"
NAME_ALLOWED = "1..128 letters, digits, _, - or ."
JSON_TYPES = ("string", "number", "integer", "boolean", "array", "null")
MODES = ("auto", "required")
CHOICE_FORMS = (
    '{"type": "function", "function": {"name": ...}}',
    '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}',
)
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of one request and what may be done with them.

    Attributes:
        listed: as the body has them, for the chat template; empty if none may be called.
        choice: ``none``, ``auto``, ``required``, or ``named`` for the one in `allowed`.
        allowed: names of the tools that may be called.
        is_parallel: several calls in one message.
    """

    listed: tuple[dict[str, Any], ...] = ()
    choice: str = "none"
    allowed: tuple[str, ...] = ()
    is_parallel: bool = True

    @property
    def must_call(self) -> bool:
        """Whether the reply has to be a call."""
        return self.choice in ("required", "named")

    @property
    def max_calls(self) -> int:
        """Most calls in one message."""
        return MAX_CALLS if self.is_parallel and self.choice != "named" else 1

    def parameters(self, name: str) -> Any:
        """Return the JSON schema of a tool's arguments."""
        function = next(t["function"] for t in self.listed if t["function"]["name"] == name)
        return function.get("parameters") or NO_ARGUMENTS


def read_tools(body: Body) -> Tools:
    """Read ``tools``, ``tool_choice`` and ``parallel_tool_calls``."""
    listed = body.listed("tools", MAX_TOOLS, "tools")
    for index, tool in enumerate(listed):
        _check_tool(f"tools[{index}]", tool)
    names = [tool["function"]["name"] for tool in listed]
    if len(set(names)) < len(names):
        body.refuse("tools", names, "tools with different names")
    is_parallel = body.boolean("parallel_tool_calls", True)
    choice = body.raw("tool_choice", "auto" if listed else "none")
    if choice == "none" or (choice == "auto" and not listed):
        return Tools()
    if not listed:
        body.refuse("tool_choice", choice, "'none' or 'auto' without tools")
    if choice in MODES:
        return Tools(tuple(listed), choice, tuple(names), is_parallel)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        mode, allowed = _subset(body, choice.get("allowed_tools"), names)
        return Tools(tuple(listed), mode, allowed, is_parallel)
    if _function_name(choice) is None:
        refuse_choice(body, choice, CHOICE_FORMS)
    return Tools(tuple(listed), "named", (_named(body, "tool_choice", choice, names),), is_parallel)


def refuse_choice(body: Body, choice: Any, forms: Sequence[str]) -> NoReturn:
    """Raise the error for a ``tool_choice`` that is neither a word nor one of the forms."""
    body.refuse("tool_choice", choice, "'none', 'auto', 'required', " + " or ".join(forms))


def _subset(body: Body, given: Any, names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Read the mode, and the names of the tools that may be called of those that are listed."""
    param = "tool_choice.allowed_tools"
    if not isinstance(given, dict):
        body.refuse(param, given, "an object with mode and tools")
    mode, tools = given.get("mode"), given.get("tools")
    if mode not in MODES:
        body.refuse(f"{param}.mode", mode, "'auto' or 'required'")
    if not isinstance(tools, list) or not 1 <= len(tools) <= MAX_TOOLS:
        body.refuse(f"{param}.tools", tools, f"a list of 1..{MAX_TOOLS} tools")
    allowed = [_named(body, f"{param}.tools[{i}]", tool, names) for i, tool in enumerate(tools)]
    return mode, tuple(dict.fromkeys(allowed))


def _named(body: Body, param: str, tool: Any, names: Sequence[str]) -> str:
    name = _function_name(tool)
    if name is None:
        body.refuse(param, tool, "a tool of type 'function' with its name")
    if name not in names:
        body.refuse(f"{param}.function.name", name, "one of: " + ", ".join(names))
    return name


def _function_name(tool: Any) -> str | None:
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and tool.get("type") == "function" else None


def _check_tool(param: str, tool: Any) -> None:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise InvalidRequest.field(param, tool, "an object with type 'function' and function")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest.field(f"{param}.function", function, "an object with a name")
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(TOOL_NAME, name):
        raise InvalidRequest.field(f"{param}.function.name", name, NAME_ALLOWED)
    if function.get("description") is not None:
        check_text(f"{param}.function.description", function["description"])
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise InvalidRequest.field(f"{param}.function.parameters", parameters, "a JSON schema")


def read_tool_calls(param: str, calls: Any) -> list[dict[str, Any]]:
    """Read an assistant message's ``tool_calls``, arguments parsed as chat templates expect them.

    Raises:
        InvalidRequest: names the field.
    """
    if not isinstance(calls, list) or not 1 <= len(calls) <= MAX_CALLS:
        raise InvalidRequest.field(param, calls, f"a list of 1..{MAX_CALLS} tool calls")
    return [_read_call(f"{param}[{index}]", call) for index, call in enumerate(calls)]


def _read_call(param: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise InvalidRequest.field(param, call, "an object with id, type and function")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest.field(f"{param}.function.name", name, "the name of a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(check_text(f"{param}.function.arguments", arguments) or "{}")
            check_depth(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        given = function.get("arguments")
        raise InvalidRequest.field(f"{param}.function.arguments", given, "a JSON object as text")
    read: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        read["id"] = check_text(f"{param}.id", call["id"])
    return read


def call_grammar(
    tools: Tools, form: CallFormat, tokenizer: ServedTokenizer, after: str
) -> StructuredOutput:
    """Return what a reply that has to be a call may be: one or more calls in the model's format.

    Args:
        after: the text is free until this, e.g. the end of the reasoning.
    """
    rules, lines = [], [""]
    names = [tool["function"]["name"] for tool in tools.listed]
    for index, name in enumerate(tools.allowed):
        param = f"tools[{names.index(name)}].function.parameters"
        schema = {
            "x-guidance": {"whitespace_pattern": "[ \\n]{1,8}"},
            **_object_schema(param, tools.parameters(name)),
        }
        head = f'{{"name": {json.dumps(name)}, "{form.argument_key}": '
        rules.append(f"call_{index}: {json.dumps(head)} arguments_{index} {json.dumps('}')}")
        rules.append(f"arguments_{index}: %json {json.dumps(schema)}")
        lines += ["", param]
    call = "(" + " | ".join(f"call_{index}" for index in range(len(tools.allowed))) + ")"
    several = tools.max_calls > 1
    opening = _literal(form.opening, tokenizer)
    if form.name == "hermes":
        one = f'{opening} "\\n" {call} "\\n" {_literal(form.closing, tokenizer)}'
        start = f'{one} ("\\n" {one})*' if several else one
    elif form.name == "mistral":
        start = (
            f'{opening} "[" {call} (", " {call})* "]"' if several else f'{opening} "[" {call} "]"'
        )
    elif form.name == "llama3":
        start = f'{call} ("; " {call})*' if several else call
    else:
        start = f'{call} | "[" {call} (", " {call})* "]"' if several else call
    text = "\n".join([f"start: {start}", *rules])
    if len(text) > MAX_STRUCTURED_CHARS:
        message = (
            f"their parameters are too long, expected at most {MAX_STRUCTURED_CHARS} characters"
        )
        raise InvalidRequest(f"tools: {message} together", param="tools")
    return StructuredOutput("grammar", text, after, param="tools", lines=tuple(lines))


def _object_schema(param: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a call's arguments: of objects only, also where it does not say so."""
    schema: dict[str, Any] = copy.deepcopy(dict(parameters))
    close_objects(schema)
    given = schema.get("type", "object")
    kinds = given if isinstance(given, list) else [given]
    if "object" in kinds:
        schema["type"] = "object"
    elif all(kind in JSON_TYPES for kind in kinds):
        raise InvalidRequest.field(f"{param}.type", given, "'object'")
    return schema


def _literal(mark: str, tokenizer: ServedTokenizer) -> str:
    """Write a mark in a grammar: as a text, or as its control token, which no text can match."""
    token_id = control_token(mark, tokenizer)
    return json.dumps(mark) if token_id is None else f"<[{token_id}]>"


def control_token(mark: str, tokenizer: ServedTokenizer) -> int | None:
    """Return the id of a mark that is a control token, which output text leaves out."""
    token_id = tokenizer.token_id(mark) if mark else None
    return token_id if token_id is not None and tokenizer.is_special(token_id) else None


PREAMBLE = (
    "You may call these functions. To call one, answer with nothing but a JSON object "
    '{"name": <function>, "arguments": <object>}; several calls are a JSON list of such objects.\n'
)


def messages_without_tools(
    messages: Sequence[Mapping[str, Any]], tools: Tools
) -> list[dict[str, Any]]:
    """Rewrite a chat for a template that knows no tools: as system text, calls and results as text.

    Such models weren't trained to call tools; this tells them what the reply's parser reads.
    """
    plain = [_plain_message(message) for message in messages]
    if not tools.listed:
        return plain
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools.listed)
    if plain and plain[0]["role"] == "system":
        system = {**plain[0], "content": f"{content_text(plain[0])}\n\n{PREAMBLE}{described}"}
        return [system, *plain[1:]]
    return [{"role": "system", "content": PREAMBLE + described}, *plain]


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        name = message.get("name") or message.get("tool_call_id") or "the function"
        return {"role": "user", "content": f"Result of {name}: {content_text(message)}"}
    if not message.get("tool_calls"):
        return dict(message)
    calls = [call["function"] for call in message["tool_calls"]]
    text = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    return {"role": message["role"], "content": content_text(message) + text}
