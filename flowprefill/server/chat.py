"""POST /v1/chat/completions: its own fields, and the shape of its replies and stream events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from flowprefill.errors import InvalidRequest
from flowprefill.models.chat_template import content_text
from flowprefill.request import MAX_LOGPROBS, Request, Token
from flowprefill.server.body import Body, check_text
from flowprefill.server.endpoint import Endpoint, GenerationOrder, shared_prompt
from flowprefill.server.engine_protocol import ServedEngine, ServedTokenizer
from flowprefill.server.generation import respond
from flowprefill.server.logprobs import chat_entry
from flowprefill.server.openai_schema import MAX_INT, SchemaContext, generation_spec

MAX_MESSAGES = 10_000
ROLES = ("system", "developer", "user", "assistant")
# Of the template's variables, those the server fills in itself.
OWN_TEMPLATE_VARIABLES = ("messages", "tools", "documents", "tokenize", "chat_template")


def read_messages(body: Body) -> list[dict[str, Any]]:
    """Read ``messages`` into role, content and, if given, name.

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
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            allowed = "null: tools and audio are not supported"
            raise InvalidRequest.field(f"{param}.{name}", message[name], allowed)
    checked = {
        "role": "system" if role == "developer" else role,
        "content": content_text(f"{param}.content", message.get("content")),
    }
    if message.get("name") is not None:
        checked["name"] = check_text(f"{param}.name", message["name"])
    return checked


def read_template_variables(body: Body) -> dict[str, Any]:
    """Read what is handed to the chat template besides the messages."""
    given = body.raw("chat_template_kwargs", {})
    if not isinstance(given, dict):
        body.refuse("chat_template_kwargs", given, "an object")
    for name in OWN_TEMPLATE_VARIABLES:
        if name in given:
            body.refuse(f"chat_template_kwargs.{name}", given[name], "other variables only")
    variables = dict(given)
    variables["add_generation_prompt"] = body.boolean("add_generation_prompt", True)
    if body.boolean("continue_final_message"):
        body.refuse("continue_final_message", True, "false: this field is not supported")
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


def _read_logprobs(body: Body) -> int | None:
    wanted = body.boolean("logprobs")
    top: int | None = body.integer("top_logprobs", None, 0, MAX_LOGPROBS)
    if top and not wanted:
        body.refuse("top_logprobs", top, "null unless logprobs is true")
    return (top or 0) if wanted else None


def order_of_chat(body: Body, context: SchemaContext, max_choices: int) -> GenerationOrder:
    """Check the whole body and return what to submit; the template runs at submission."""
    messages = read_messages(body)
    variables = read_template_variables(body)
    spec = generation_spec(
        body, context, max_tokens=_read_max_tokens(body), logprobs=_read_logprobs(body)
    )
    if spec.n > max_choices:
        body.refuse("n", spec.n, f"at most {max_choices} choices")
    # Templates write the special tokens themselves.
    add_special_tokens = body.boolean("add_special_tokens", False)

    def requests(engine: ServedEngine, reply_id: str) -> list[Request]:
        text = engine.render_chat(messages, **variables)
        prompt = shared_prompt(engine, text, spec.n, special_tokens=add_special_tokens)
        return spec.requests([prompt], reply_id, special_tokens=add_special_tokens)

    chars = sum(len(message["content"]) for message in messages)
    return GenerationOrder(
        spec, requests, choices=spec.n, prompt_chars=chars, is_rendered=True, echo=()
    )


class ChatEndpoint(Endpoint):
    """The chat.completion shapes."""

    path = "/v1/chat/completions"
    id_prefix = "chatcmpl-"
    reply_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def order(self, body: Body, context: SchemaContext, max_choices: int) -> GenerationOrder:
        """See order_of_chat."""
        return order_of_chat(body, context, max_choices)

    def choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        """Return the endpoint's part of a whole choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": logprobs}

    def chunk_choice(self, text: str, logprobs: Any, *, is_first: bool) -> dict[str, Any]:
        """Return the endpoint's part of a choice in one stream event.

        The role comes with the first text, never before: tools that time the first event and tools
        that time the first text then agree.
        """
        delta = {"role": "assistant", "content": text} if is_first else {}
        if text:
            delta["content"] = text
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


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Handle POST /v1/chat/completions."""
    return await respond(request, ChatEndpoint())
