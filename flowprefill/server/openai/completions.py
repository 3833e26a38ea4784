"""POST /v1/completions: its own fields, and the shape of its replies and stream events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from flowprefill.engine.prompt_logprobs import PromptLogprobs
from flowprefill.errors import InvalidRequest
from flowprefill.request import MAX_LOGPROBS, Request, Token
from flowprefill.server.engine_protocol import ServedEngine, ServedTokenizer
from flowprefill.server.http.body import Body, check_text, whole_ids
from flowprefill.server.openai.endpoint import Endpoint, GenerationOrder, shared_prompt
from flowprefill.server.openai.foreign_fields import NOT_OF_COMPLETIONS, OF_CHAT_ALONE
from flowprefill.server.openai.generation import respond
from flowprefill.server.openai.logprobs import (
    begun_chars,
    finite,
    text_offsets,
    token_label,
    top_labels,
)
from flowprefill.server.openai.message import MessagePart
from flowprefill.server.openai.openai_schema import (
    CHAT_ONLY,
    MAX_INT,
    SchemaContext,
    check_token_ids,
    generation_spec,
)

DEFAULT_MAX_TOKENS = 16
Prompt = str | list[int]


def read_prompts(
    body: Body, vocab_size: int, max_prompts: int, field: str = "prompt"
) -> list[Prompt]:
    """Read a field: a string, token ids, or a list of at most ``max_prompts`` of either."""
    allowed = "a string, a list of strings, a list of token ids or a list of such lists"
    value = body.raw(field)
    if isinstance(value, str):
        value = [value]
    elif isinstance(value, list) and value and set(map(type, value)) <= {int, float}:
        value = whole_ids(value)
        check_token_ids(field, value, vocab_size)
        return [value]
    if not isinstance(value, list) or not value:
        body.refuse(field, value, allowed)
    if len(value) > max_prompts and type(value[0]) is not int:
        body.refuse(field, value, f"at most {max_prompts} prompts")
    is_single = len(value) == 1 and not isinstance(body.raw(field), list)
    kind = type(value[0])
    if kind is list:
        value = [whole_ids(prompt) if type(prompt) is list else prompt for prompt in value]
    for index, prompt in enumerate(value):
        name = field if is_single else f"{field}[{index}]"
        if kind not in (str, list) or type(prompt) is not kind:
            body.refuse(name, prompt, allowed)
        if not prompt:
            body.refuse(name, prompt, "at least one token")
        if isinstance(prompt, str):
            check_text(name, prompt)
        else:
            check_token_ids(name, prompt, vocab_size)
    return value


def order_of_completions(body: Body, context: SchemaContext, max_choices: int) -> GenerationOrder:
    """Check the whole body and return what to submit; touches no engine."""
    body.only_neutral(CHAT_ONLY, "only chats have tools")
    body.only_neutral(NOT_OF_COMPLETIONS)
    body.accept(OF_CHAT_ALONE)
    prompts = read_prompts(body, context.vocab_size, max_choices)
    logprobs = body.integer("logprobs", None, 0, MAX_LOGPROBS)
    echo = body.boolean("echo")
    max_tokens = body.integer("max_tokens", DEFAULT_MAX_TOKENS, 0, MAX_INT)
    # A prompt that is shown or scored is an answer without any token generated.
    if max_tokens == 0 and not echo and body.raw("prompt_logprobs") is None:
        body.refuse("max_tokens", 0, "at least 1 without echo or prompt_logprobs")
    spec = generation_spec(
        body,
        context,
        max_tokens=max_tokens,
        logprobs=logprobs,
        echo_logprobs=logprobs if echo else None,
    )
    if len(prompts) * spec.n > max_choices:
        raise InvalidRequest(
            f"prompt: got {len(prompts)} prompts times n = {spec.n}, "
            f"expected at most {max_choices} choices",
            param="prompt",
        )
    add_special_tokens = body.boolean("add_special_tokens", True)

    def requests(engine: ServedEngine, reply_id: str) -> list[Request]:
        shared = [
            shared_prompt(engine, prompt, spec.n, special_tokens=add_special_tokens)
            for prompt in prompts
        ]
        return spec.requests(shared, reply_id, special_tokens=add_special_tokens)

    return GenerationOrder(
        spec=spec,
        requests=requests,
        choices=len(prompts) * spec.n,
        prompt_chars=sum(len(prompt) for prompt in prompts),
        is_rendered=False,
        echo=tuple(prompts) if echo else (),
        keeps_body=echo,
    )


class CompletionsEndpoint(Endpoint):
    """The text_completion shapes."""

    path = "/v1/completions"
    id_prefix = "cmpl-"
    reply_object = "text_completion"
    chunk_object = "text_completion"

    def order(self, body: Body, context: SchemaContext, max_choices: int) -> GenerationOrder:
        """See order_of_completions."""
        return order_of_completions(body, context, max_choices)

    def choice(self, part: MessagePart, logprobs: Any) -> dict[str, Any]:
        """Return the endpoint's part of a whole choice."""
        return {"text": part.content, "logprobs": logprobs}

    def chunk_choice(
        self,
        part: MessagePart,
        logprobs: Any,
        *,
        is_first: bool,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return the endpoint's part of a choice in one stream event."""
        return {"text": part.content, "logprobs": logprobs}

    def logprobs(
        self, tokens: Sequence[Token], tokenizer: ServedTokenizer, text_offset: int
    ) -> Mapping[str, Any]:
        """Return parallel lists: token texts, their logprobs, alternatives, offsets in the text."""
        offsets = []
        for token in tokens:
            offsets.append(text_offset)
            text_offset += begun_chars(tokenizer, token)
        return {
            "tokens": [token_label(tokenizer, token.token_id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [top_labels(tokenizer, token) for token in tokens],
            "text_offset": offsets,
        }

    def with_echo(
        self,
        logprobs: Mapping[str, Any],
        prompt: PromptLogprobs,
        top: int,
        text: str,
        tokenizer: ServedTokenizer,
    ) -> Mapping[str, Any]:
        """Return the same lists with the prompt's tokens before them; null for its first."""
        echo = {
            "tokens": [token_label(tokenizer, token) for token in prompt.token_ids.tolist()],
            "token_logprobs": [None, *map(finite, prompt.logprobs[1:].tolist())],
            "top_logprobs": [
                None if entry is None else top_labels(tokenizer, entry, top) for entry in prompt
            ],
            "text_offset": text_offsets(tokenizer, prompt.token_ids.tolist(), text),
        }
        return {name: values + logprobs[name] for name, values in echo.items()}

    def with_prompt_logprobs(
        self, payload: dict[str, Any], prompts: Sequence[list[dict[str, Any] | None]]
    ) -> None:
        """Put what vLLM calls prompt_logprobs into each choice."""
        for choice, prompt in zip(payload["choices"], prompts, strict=True):
            choice["prompt_logprobs"] = prompt


async def completions(request: web.Request) -> web.StreamResponse:
    """Handle POST /v1/completions."""
    return await respond(request, CompletionsEndpoint())
