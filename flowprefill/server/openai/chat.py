"""POST /v1/chat/completions: its own fields, and the shape of its replies and stream events."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from flowprefill.errors import InvalidRequest
from flowprefill.models.chat_template import (
    REASONING,
    checked_content,
    text_chars,
)
from flowprefill.request import MAX_LOGPROBS, Request, Token
from flowprefill.server.engine_protocol import ServedEngine, ServedTokenizer
from flowprefill.server.http.body import Body, check_text
from flowprefill.server.openai.chat_turn import ChatTurn
from flowprefill.server.openai.endpoint import Endpoint, GenerationOrder, shared_prompt
from flowprefill.server.openai.foreign_fields import NOT_OF_CHAT
from flowprefill.server.openai.generation import respond
from flowprefill.server.openai.logprobs import chat_entry
from flowprefill.server.openai.message import CallPart, MessagePart
from flowprefill.server.openai.openai_schema import MAX_INT, SchemaContext, generation_spec
from flowprefill.server.openai.reasoning import reasoning_parser_of
from flowprefill.server.openai.tool_parsers import call_format_of
from flowprefill.server.openai.tools import read_tool_calls, read_tools
from flowprefill.server.openai.written_names import as_written

MAX_MESSAGES = MAX_DOCUMENTS = 10_000
ROLES = ("system", "developer", "user", "assistant", "tool")
# Of the template's variables, those the server fills in itself.
OWN_TEMPLATE_VARIABLES = ("messages", "tools", "documents", "tokenize", "chat_template")


def read_messages(body: Body) -> list[dict[str, Any]]:
    """Read ``messages``; what else than role and content is in one is for the chat template.

    ``developer`` is OpenAI's newer word for ``system``; templates know only the latter.
    """
    messages = body.raw("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        body.refuse("messages", messages, f"a list of 1..{MAX_MESSAGES} messages")
    return [_read_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _read_message(param: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest.field(param, message, "an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest.field(f"{param}.role", role, "one of: " + ", ".join(ROLES))
    for name in ("function_call", "audio"):
        if message.get(name):
            allowed = "null: this field is not supported"
            raise InvalidRequest.field(f"{param}.{name}", message[name], allowed)
    checked = dict(message) | {"role": "system" if role == "developer" else role}
    calls = checked.pop("tool_calls", None) or None
    if calls is not None:
        if role != "assistant":
            raise InvalidRequest.field(f"{param}.tool_calls", calls, "null unless it's assistant's")
        checked["tool_calls"] = read_tool_calls(f"{param}.tool_calls", calls)
    content = message.get("content")
    if content is not None or role != "assistant":
        checked["content"] = checked_content(f"{param}.content", content)
    for name in ("name", "tool_call_id", *REASONING):
        if message.get(name) is not None:
            checked[name] = check_text(f"{param}.{name}", message[name])
    return checked


def ends_open(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last message is a beginning of the reply, as Mistral and Moonshot mark it."""
    last = messages[-1]
    return last["role"] == "assistant" and any(last.get(k) is True for k in ("prefix", "partial"))


def _read_thinking(body: Body, variables: dict[str, Any]) -> None:
    """Read how much the model is to think; what chat_template_kwargs says of it counts first."""
    thinks = body.boolean("enable_thinking", True)
    if body.raw("enable_thinking") is not None:  # of services of Qwen's and others
        variables.setdefault("enable_thinking", thinks)
    effort = body.text("reasoning_effort")
    if effort is not None:
        variables.setdefault("reasoning_effort", effort)
        for name in ("enable_thinking", "thinking"):  # what templates without levels look at
            variables.setdefault(name, effort != "none")


def read_template_variables(body: Body, continues: bool) -> dict[str, Any]:
    """Read what is handed to the chat template besides the messages.

    Args:
        continues: the reply continues the last message.
    """
    given = body.raw("chat_template_kwargs", {})
    if not isinstance(given, dict):
        body.refuse("chat_template_kwargs", given, "an object")
    for name in OWN_TEMPLATE_VARIABLES:
        if name in given:
            body.refuse(f"chat_template_kwargs.{name}", given[name], "other variables only")
    variables = dict(given)
    _read_thinking(body, variables)
    documents = body.listed("documents", MAX_DOCUMENTS, "objects with title and text")
    for index, document in enumerate(documents):
        if not isinstance(document, dict):
            body.refuse(f"documents[{index}]", document, "an object with title and text")
    if documents:
        variables["documents"] = documents
    adds_prompt = body.boolean("add_generation_prompt", not continues)
    if continues and adds_prompt:
        body.refuse("add_generation_prompt", True, "false with continue_final_message")
    variables["add_generation_prompt"] = adds_prompt
    if body.raw("chat_template") is not None:
        body.refuse("chat_template", body.raw("chat_template"), "null: the model's own is used")
    return variables


def _read_max_tokens(body: Body) -> int | None:
    """Read ``max_completion_tokens`` and its older name; giving both is fine if they agree."""
    new: int | None = body.integer("max_completion_tokens", None, 1, MAX_INT)
    old: int | None = body.integer("max_tokens", None, 1, MAX_INT)
    if new is not None and old is not None and new != old:
        body.refuse("max_tokens", old, f"null, or max_completion_tokens = {new}")
    return new if new is not None else old


def _names(body: Body) -> dict[str, str]:
    """Return what the body calls what the engine calls otherwise."""
    is_new = body.raw("max_completion_tokens") is not None
    return {"prompt": "messages"} | ({"max_tokens": "max_completion_tokens"} if is_new else {})


def _read_logprobs(body: Body) -> int | None:
    wanted = body.boolean("logprobs")
    top: int | None = body.integer("top_logprobs", None, 0, MAX_LOGPROBS)
    if top and not wanted:
        body.refuse("top_logprobs", top, "null unless logprobs is true")
    return (top or 0) if wanted else None


def read_turn(
    body: Body, template: str, tool_parser: str = "auto", reasoning_parser: str = "auto"
) -> ChatTurn:
    """Read what makes the prompt of a chat; the parsers as the server's options name them."""
    messages = read_messages(body)
    continues = body.boolean("continue_final_message") or ends_open(messages)
    turn = ChatTurn(
        messages=messages,
        variables=read_template_variables(body, continues),
        tools=read_tools(body),
        form=call_format_of(tool_parser, template),
        continues=continues,
        is_thinking=reasoning_parser_of(reasoning_parser, template) == "think",
        shows_reasoning=body.boolean("include_reasoning", True),
    )
    if turn.continues:
        turn.is_thinking = False
    return turn


def order_of_chat(body: Body, context: SchemaContext, max_choices: int) -> GenerationOrder:
    """Check the whole body and return what to submit; the template runs at submission."""
    body.only_neutral(NOT_OF_CHAT)
    turn = read_turn(body, context.chat_template, context.tool_parser, context.reasoning_parser)
    max_tokens, logprobs, names = _read_max_tokens(body), _read_logprobs(body), _names(body)
    try:
        spec = generation_spec(body, context, max_tokens=max_tokens, logprobs=logprobs)
    except InvalidRequest as error:
        raise as_written(error, names) from None
    if spec.n > max_choices:
        body.refuse("n", spec.n, f"at most {max_choices} choices")
    if spec.sampling.structured is not None and turn.tools.listed:
        param = spec.sampling.structured.param
        message = f"{param}: got it together with tools, expected one of the two"
        raise InvalidRequest(message, param=param)
    # Templates write the special tokens themselves.
    add_special_tokens = body.boolean("add_special_tokens", False)

    def requests(engine: ServedEngine, reply_id: str) -> list[Request]:
        text = turn.render(engine)
        sampling = turn.sampling(spec.sampling, engine.tokenizer)
        turn.forget_prompt()
        prompt = shared_prompt(engine, text, spec.n, special_tokens=add_special_tokens)
        final = dataclasses.replace(spec, sampling=sampling)
        return final.requests([prompt], reply_id, special_tokens=add_special_tokens)

    return GenerationOrder(
        spec,
        requests,
        choices=spec.n,
        prompt_chars=text_chars([turn.messages, turn.variables.get("documents")]),
        is_rendered=True,
        echo=(),
        parser=turn.parser,
        names=names,
    )


def whole_call(call: CallPart) -> dict[str, Any]:
    """Return a tool call as a message holds it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _call_delta(call: CallPart) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **whole_call(call)}


class ChatEndpoint(Endpoint):
    """The chat.completion shapes."""

    path = "/v1/chat/completions"
    id_prefix = "chatcmpl-"
    reply_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def order(self, body: Body, context: SchemaContext, max_choices: int) -> GenerationOrder:
        """See order_of_chat."""
        return order_of_chat(body, context, max_choices)

    def choice(self, part: MessagePart, logprobs: Any) -> dict[str, Any]:
        """Return the endpoint's part of a whole choice."""
        content = part.content if part.content or not part.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if part.reasoning:
            message["reasoning_content"] = part.reasoning
        if part.calls:
            message["tool_calls"] = [whole_call(call) for call in part.calls]
        return {"message": message, "logprobs": logprobs}

    def chunk_choice(self, part: MessagePart, logprobs: Any, *, is_first: bool) -> dict[str, Any]:
        """Return the endpoint's part of a choice in one stream event.

        The role comes with the first text, never before: tools that time the first event and tools
        that time the first text then agree.
        """
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        if part.content or (is_first and part.is_empty):
            delta["content"] = part.content
        if part.reasoning:
            delta["reasoning_content"] = part.reasoning
        if part.calls:
            delta["tool_calls"] = [_call_delta(call) for call in part.calls]
        return {"delta": delta, "logprobs": logprobs}

    def logprobs(
        self,
        tokens: Sequence[Token],
        tokenizer: ServedTokenizer,
        text_offset: int,  # noqa: ARG002
    ) -> Mapping[str, Any]:
        """Return one entry per token with its alternatives."""
        content = []
        for token in tokens:
            entry = chat_entry(tokenizer, token.token_id, token.logprob)
            entry["top_logprobs"] = [
                chat_entry(tokenizer, top.token_id, top.logprob) for top in token.top_logprobs
            ]
            content.append(entry)
        return {"content": content, "refusal": None}

    def with_prompt_logprobs(
        self, payload: dict[str, Any], prompts: Sequence[list[dict[str, Any] | None]]
    ) -> None:
        """Put what vLLM calls prompt_logprobs at the top level: choices share the prompt."""
        payload["prompt_logprobs"] = prompts[0]


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Handle POST /v1/chat/completions."""
    return await respond(request, ChatEndpoint())
