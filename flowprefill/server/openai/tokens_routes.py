"""POST /tokenize and /detokenize; called by app.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from flowprefill.server.context import SERVER
from flowprefill.server.engine_protocol import ServedEngine
from flowprefill.server.http.body import Body, parse_json_object, whole_ids
from flowprefill.server.http.incoming import json_body
from flowprefill.server.lanes import lane_of
from flowprefill.server.openai.chat import read_turn
from flowprefill.server.openai.chat_turn import ChatTurn
from flowprefill.server.openai.logprobs import token_label
from flowprefill.server.openai.openai_schema import check_token_ids
from flowprefill.server.openai.replies import long_json

# What only a chat has, and what of it changes nothing about a text.
OF_CHATS: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True, False), "chat_template": (), "chat_template_kwargs": ({},),
    "continue_final_message": (False,), "documents": ([],), "enable_thinking": (True, False),
    "include_reasoning": (True, False), "parallel_tool_calls": (True, False),
    "reasoning_effort": (), "tool_choice": ("none", "auto"), "tools": ([],),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TextOrder:
    """A checked body of /tokenize: a text, or a chat whose template makes it."""

    source: str | ChatTurn
    special_tokens: bool
    with_strings: bool


def read_tokenize(body: Body, chat_template: str) -> TextOrder:
    """Read ``prompt``, or ``messages`` and the other fields of a chat."""
    source: str | ChatTurn | None = body.text("prompt")
    is_chat = body.raw("messages") is not None
    if is_chat:
        if source is not None:
            body.refuse("prompt", source, "null with messages")
        source = read_turn(body, chat_template)
    if source is None:
        body.refuse("prompt", None, "a string, or messages instead")
    if not is_chat:
        Body(body.fields).only_neutral(OF_CHATS, "a text goes through no chat template")
        body.accept(OF_CHATS)
    return TextOrder(
        source, body.boolean("add_special_tokens", not is_chat), body.boolean("return_token_strs")
    )


def read_detokenize(body: Body, vocab_size: int) -> list[int]:
    """Read ``tokens``."""
    tokens = body.raw("tokens")
    if not isinstance(tokens, list):
        body.refuse("tokens", tokens, "a list of token ids")
    tokens = whole_ids(tokens)
    check_token_ids("tokens", tokens, vocab_size)
    return tokens


def _tokenize(engine: ServedEngine, body: Body) -> dict[str, Any]:
    order = read_tokenize(body, engine.chat_template)
    text = order.source if isinstance(order.source, str) else order.source.render(engine)
    engine.tokenizer.check_fits(text, engine.max_model_len)
    ids = engine.tokenizer.encode(text, order.special_tokens)
    reply: dict[str, Any] = {"count": len(ids), "max_model_len": engine.max_model_len}
    reply["tokens"] = ids
    if order.with_strings:
        reply["token_strs"] = [token_label(engine.tokenizer, token) for token in ids]
    return reply


def _detokenize(engine: ServedEngine, body: Body) -> dict[str, Any]:
    return {"prompt": engine.tokenizer.decode(read_detokenize(body, engine.vocab_size))}


async def _answer(request: web.Request, work: Any) -> web.Response:
    context = request.app[SERVER]
    engine = context.engine
    context.check_key(request.headers)

    def run(raw: bytes) -> tuple[str, Body]:
        body = Body(parse_json_object(raw, engine.max_model_len))
        context.check_model(body.text("model"))
        return long_json(work(engine, body)), body

    # Always in a thread: a chat template waits for another process, encoding is slower than
    # parsing, and clients of these endpoints are in no hurry.
    async with json_body(request) as raw:
        reply, body = await context.lanes.run(lane_of(len(raw)), run, raw)
    context.unknown_fields.check(request.path, body)
    return web.json_response(text=reply)


async def tokenize(request: web.Request) -> web.Response:
    """Handle POST /tokenize."""
    return await _answer(request, _tokenize)


async def detokenize(request: web.Request) -> web.Response:
    """Handle POST /detokenize."""
    return await _answer(request, _detokenize)
