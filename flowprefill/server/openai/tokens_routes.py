"""POST /tokenize and /detokenize; called by app.py."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from flowprefill.server.context import SERVER
from flowprefill.server.engine_protocol import ServedEngine
from flowprefill.server.http.body import Body, parse_json_object, whole_ids
from flowprefill.server.http.incoming import json_body
from flowprefill.server.openai.chat import read_turn
from flowprefill.server.openai.logprobs import token_label
from flowprefill.server.openai.openai_schema import check_token_ids
from flowprefill.server.openai.replies import long_json


def _tokenize(engine: ServedEngine, body: Body) -> dict[str, Any]:
    """Encode ``prompt``, or ``messages`` through the chat template."""
    if body.raw("messages") is not None:
        if body.raw("prompt") is not None:
            body.refuse("prompt", body.raw("prompt"), "null with messages")
        text = read_turn(body, engine.chat_template).render(engine)
        special_tokens = body.boolean("add_special_tokens", False)
    else:
        prompt = body.text("prompt")
        if prompt is None:
            body.refuse("prompt", None, "a string, or messages instead")
        text, special_tokens = prompt, body.boolean("add_special_tokens", True)
    engine.tokenizer.check_fits(text, engine.max_model_len)
    ids = engine.tokenizer.encode(text, special_tokens)
    reply: dict[str, Any] = {"count": len(ids), "max_model_len": engine.max_model_len}
    reply["tokens"] = ids
    if body.boolean("return_token_strs"):
        reply["token_strs"] = [token_label(engine.tokenizer, token) for token in ids]
    return reply


def _detokenize(engine: ServedEngine, body: Body) -> dict[str, Any]:
    """Decode ``tokens``."""
    tokens = body.raw("tokens")
    if not isinstance(tokens, list):
        body.refuse("tokens", tokens, "a list of token ids")
    tokens = whole_ids(tokens)
    check_token_ids("tokens", tokens, engine.vocab_size)
    return {"prompt": engine.tokenizer.decode(tokens)}


async def _answer(request: web.Request, work: Any) -> web.Response:
    context = request.app[SERVER]
    engine = context.engine

    def run(raw: bytes) -> tuple[str, Body]:
        body = Body(parse_json_object(raw, engine.max_model_len))
        context.check_model(body.text("model"))
        return long_json(work(engine, body)), body

    # Always in a thread: a chat template waits for another process, encoding is slower than
    # parsing, and clients of these endpoints are in no hurry.
    async with json_body(request) as raw:
        reply, body = await context.in_thread(run, raw)
    context.unknown_fields.warn(request.path, body)
    return web.json_response(text=reply)


async def tokenize(request: web.Request) -> web.Response:
    """Handle POST /tokenize."""
    return await _answer(request, _tokenize)


async def detokenize(request: web.Request) -> web.Response:
    """Handle POST /detokenize."""
    return await _answer(request, _detokenize)
