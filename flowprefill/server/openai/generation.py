"""From a generating HTTP request to its reply: read, check, submit, wait or stream, cancel.

The handlers of both endpoints call respond().
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from flowprefill.errors import InvalidRequest, exact
from flowprefill.request import Completion, Request
from flowprefill.server.context import HANDLES, REQUEST_ID, SERVER, ServerContext
from flowprefill.server.engine_protocol import ServedEngine, ServedHandle
from flowprefill.server.http.body import Body, parse_json_object
from flowprefill.server.http.incoming import json_body
from flowprefill.server.openai.endpoint import GENERATION, Endpoint, Generation, GenerationOrder
from flowprefill.server.openai.logprobs import prompt_entries
from flowprefill.server.openai.message import read_whole
from flowprefill.server.openai.openai_schema import SchemaContext
from flowprefill.server.openai.replies import (
    Envelope,
    long_json,
    new_reply_id,
    total_reasoning,
    usage_object,
)
from flowprefill.server.openai.streaming import stream_reply
from flowprefill.server.openai.written_names import as_written

logger = logging.getLogger(__name__)

# Above these, work that would hold the event loop for more than a millisecond or two goes to a
# thread: parsing and checking a body, tokenising prompts, submitting choices.
LONG_BODY_BYTES = 16 * 1024
LONG_PROMPT_CHARS = 8_000
MANY_CHOICES = 16
LONG_REPLY_TOKENS = 2_000


def _check_work(requests: Sequence[Request], engine: ServedEngine, limit_s: float) -> None:
    """Refuse what would keep the device for hours; one choice is bounded by the model's length."""
    if len(requests) == 1 or not limit_s:
        return
    seconds = engine.predicted_work_s(requests)
    if seconds > limit_s:
        raise InvalidRequest(
            f"prompt: {len(requests)} choices (prompts times n) with all tokens that they may "
            f"generate are {seconds:.0f} s of work by prediction, expected at most "
            f"{exact(limit_s)} s in one request",
            param="prompt",
        )


def _submit(
    context: ServerContext, endpoint: Endpoint, order: GenerationOrder, envelope: Envelope
) -> Generation:
    """Submit every choice, or none: what was admitted before an error is cancelled."""
    engine = context.engine
    handles: list[ServedHandle] = []
    names = dict(order.names)
    prompt = names.get("prompt", "prompt")
    try:
        requests = order.requests(engine, envelope.id)
        _check_work(requests, engine, context.options.max_request_s)
        submitted_s = time.monotonic()
        for index, request in enumerate(requests):
            if len(requests) > order.spec.n:  # several prompts: which one
                names["prompt"] = f"{prompt}[{index // order.spec.n}]"
            handles.append(engine.submit(request, order.spec.slo))
        echo = tuple(
            text if isinstance(text, str) else engine.tokenizer.decode(text) for text in order.echo
        )
    except InvalidRequest as error:
        cancel_all(handles)
        raise as_written(error, names) from None
    except BaseException:
        cancel_all(handles)
        raise
    return Generation(endpoint, order, envelope, engine, handles, echo, submitted_s)


def cancel_all(handles: Sequence[ServedHandle]) -> None:
    """Cancel requests; those that have ended are not touched."""
    for handle in handles:
        handle.cancel()


def _cancel_submitted(task: asyncio.Task[Generation]) -> None:
    """Cancel what a thread submitted after its client had gone."""
    if not task.cancelled() and task.exception() is None:
        cancel_all(task.result().handles)


async def _submit_off_loop(
    context: ServerContext, endpoint: Endpoint, order: GenerationOrder, envelope: Envelope
) -> Generation:
    """Submit in a thread; if the client goes meanwhile, what was submitted is cancelled."""
    work = context.in_thread(_submit, context, endpoint, order, envelope)
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_cancel_submitted)
        raise


async def _read_order(
    request: web.Request, endpoint: Endpoint, context: ServerContext
) -> GenerationOrder:
    """Read and check the body, in a thread if it is long; while overloaded not even that."""
    engine = context.engine
    rules = context.rules_for(request.headers, request.remote)
    schema = SchemaContext(
        headers=request.headers,
        config=engine.config,
        service_tiers=context.options.service_tiers,
        vocab_size=engine.vocab_size,
        rules=rules,
        chat_template=engine.chat_template,
        tool_parser=context.options.tool_call_parser,
        reasoning_parser=context.options.reasoning_parser,
        sampling_defaults=(
            engine.sampling_defaults if context.options.generation_config == "auto" else {}
        ),
    )

    def check(raw: bytes) -> tuple[GenerationOrder, Body]:
        body = Body(parse_json_object(raw, engine.max_model_len))
        return endpoint.order(body, schema, context.options.max_choices), body

    async with json_body(request) as raw:
        engine.check_load(rules.tenant.name)
        is_short = len(raw) <= LONG_BODY_BYTES
        order, body = check(raw) if is_short else await context.in_thread(check, raw)
    context.unknown_fields.check(endpoint.path, body)
    return order


async def respond(request: web.Request, endpoint: Endpoint) -> web.StreamResponse:
    """Handle one generating request from its body to the end of its reply.

    However this ends (reply sent, error, client gone), everything submitted has ended or is
    cancelled afterwards.
    """
    context = request.app[SERVER]
    order = await _read_order(request, endpoint, context)
    envelope = Envelope(
        id=new_reply_id(endpoint.id_prefix),
        model=context.check_model(order.spec.model),
        system_fingerprint=context.fingerprint,
        service_tier=order.spec.service_tier,
    )
    logger.debug("%s: %s %s", request[REQUEST_ID], endpoint.path, envelope.id)
    handles: list[ServedHandle] = []
    context.begin_generation()
    try:
        if _is_quick(order):
            generation = _submit(context, endpoint, order, envelope)
        else:
            generation = await _submit_off_loop(context, endpoint, order, envelope)
        request[GENERATION] = generation
        handles = request[HANDLES] = generation.handles
        if order.spec.stream is not None:
            return await stream_reply(request, generation)
        return await _whole_reply(context, generation)
    finally:
        cancel_all(handles)
        context.end_generation()


def _is_quick(order: GenerationOrder) -> bool:
    """Whether submitting may hold the event loop: a thread would cost a short prompt more."""
    return (
        not order.is_rendered
        and order.spec.sampling.structured is None  # a grammar may take long to compile
        and order.prompt_chars <= LONG_PROMPT_CHARS
        and order.choices <= MANY_CHOICES
    )


async def _whole_reply(context: ServerContext, generation: Generation) -> web.Response:
    """Wait for every choice and send one JSON object."""
    completions: list[Completion] = []
    for handle in generation.handles:
        completions.append(await handle)
    if sum(map(_shown_tokens, completions)) <= LONG_REPLY_TOKENS:
        return web.json_response(_whole_payload(generation, completions))

    def encode() -> str:
        return long_json(_whole_payload(generation, completions))

    return web.json_response(text=await context.in_thread(encode))


def _shown_tokens(completion: Completion) -> int:
    numbers = 0 if completion.embedding is None else len(completion.embedding)
    return len(completion.tokens) + len(completion.prompt_logprobs or ()) + numbers


def _whole_payload(generation: Generation, completions: list[Completion]) -> dict[str, Any]:
    spec = generation.order.spec
    if generation.order.whole is not None:
        return generation.order.whole(generation, completions)
    made = [_whole_choice(generation, i, c) for i, c in enumerate(completions)]
    choices = [choice for choice, _ in made]
    payload = generation.envelope.wrap(generation.endpoint.reply_object, choices)
    output_tokens = sum(len(completion.tokens) for completion in completions)
    reasoning = total_reasoning(count for _, count in made)
    payload["usage"] = usage_object(generation.handles, spec.n, output_tokens, reasoning)
    if spec.prompt_logprobs is not None:
        prompts = [
            prompt_entries(
                generation.engine.tokenizer,
                generation.handles[generation.scored(index)].prompt_logprobs or (),
                spec.prompt_logprobs,
            )
            for index in range(len(completions))
        ]
        generation.endpoint.with_prompt_logprobs(payload, prompts)
    if spec.return_metrics:
        payload |= generation.metrics([len(completion.tokens) for completion in completions])
    return payload


def _whole_choice(
    generation: Generation, index: int, completion: Completion
) -> tuple[dict[str, Any], int | None]:
    """Return the choice, and how many of its tokens are reasoning; see `read_whole`."""
    spec = generation.order.spec
    echo = generation.echo_text(index)
    logprobs = generation.logprobs(completion.tokens, len(echo), index)
    parser = generation.order.parser()
    part, reasoning = read_whole(parser, echo + completion.text, completion.tokens)
    choice = {
        "index": index,
        **generation.endpoint.choice(part, logprobs),
        "finish_reason": generation.finish_reason(parser, completion.finish_reason),
    }
    if spec.return_token_ids:
        choice["token_ids"] = completion.token_ids
    return choice, reasoning
