"""From a generating HTTP request to its reply: read, check, submit, wait or stream, cancel.

The handlers of both endpoints call respond().
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from aiohttp import web

from flowprefill.errors import InvalidRequest, exact
from flowprefill.request import Completion, Request, StructuredOutput
from flowprefill.server.context import HANDLES, REQUEST_ID, SERVER, ServerContext
from flowprefill.server.engine_protocol import ServedEngine, ServedHandle
from flowprefill.server.http.body import Body, parse_json_object
from flowprefill.server.http.incoming import json_body
from flowprefill.server.lanes import Lane, lane_of
from flowprefill.server.openai.endpoint import GENERATION, Endpoint, Generation, GenerationOrder
from flowprefill.server.openai.logprobs import prompt_entries
from flowprefill.server.openai.message import read_whole
from flowprefill.server.openai.openai_schema import GenerationSpec, SchemaContext
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
CHARS_OF_CHOICE = 500  # whose work takes as long as submitting one
LONG_REPLY_TOKENS = 2_000


class _Incoming:
    """A request on its way from its body to submitted choices; its methods may run in a thread."""

    def __init__(self, request: web.Request, endpoint: Endpoint) -> None:
        """Note what checking needs; raises Unauthorized, and NotReady while nothing is served."""
        context = request.app[SERVER]
        engine, options = context.engine, context.options
        self._context, self._endpoint = context, endpoint
        self.reply_id = new_reply_id(endpoint.id_prefix)
        self.rules = context.rules_for(request.headers, request.remote)
        self._schema = SchemaContext(
            headers=request.headers,
            config=engine.config,
            service_tiers=options.service_tiers,
            vocab_size=engine.vocab_size,
            rules=self.rules,
            chat_template=engine.chat_template,
            tool_parser=options.tool_call_parser,
            reasoning_parser=options.reasoning_parser,
            sampling_defaults=(
                engine.sampling_defaults if options.generation_config == "auto" else {}
            ),
        )

    def check(self, raw: bytes) -> GenerationOrder:
        """Return what a body orders; raises InvalidRequest."""
        context = self._context
        body = Body(parse_json_object(raw, context.engine.max_model_len))
        order = self._endpoint.order(body, self._schema, context.options.max_choices)
        context.unknown_fields.check(self._endpoint.path, body)
        context.check_model(order.spec.model)
        return order

    def submit(self, order: GenerationOrder, *, compiles: bool = True) -> _Submitted:
        """Submit every choice, or none: what was admitted before an error is cancelled.

        Args:
            compiles: also if a grammar has to be compiled for it.

        Returns:
            What has to be compiled if that is not to be done here.
        """
        engine, names = self._context.engine, dict(order.names)
        prompt = names.get("prompt", "prompt")
        handles: list[ServedHandle] = []
        try:
            requests = order.requests(engine, self.reply_id)
            _check_work(requests, engine, self._context.options.max_request_s)
            wanted = requests[0].sampling.structured
            if wanted is not None and not (compiles or engine.knows_grammar(wanted)):
                return wanted
            envelope, submitted_s = self._envelope(order.spec), time.monotonic()
            for index, request in enumerate(requests):
                if len(requests) > order.spec.n:  # several prompts: which one
                    names["prompt"] = f"{prompt}[{index // order.spec.n}]"
                handles.append(engine.submit(request, order.spec.slo))
            echo = tuple(
                text if isinstance(text, str) else engine.tokenizer.decode(text)
                for text in order.echo
            )
        except InvalidRequest as error:
            cancel_all(handles)
            raise as_written(error, names) from None
        except BaseException:
            cancel_all(handles)
            raise
        order = order.submitted()
        return Generation(self._endpoint, order, envelope, engine, handles, echo, submitted_s)

    def _envelope(self, spec: GenerationSpec) -> Envelope:
        return Envelope(
            id=self.reply_id,
            model=self._context.check_model(spec.model),
            system_fingerprint=self._context.fingerprint,
            service_tier=spec.service_tier,
        )

    def check_and_submit(self, raw: bytes, *, compiles: bool = True) -> _Submitted:
        """Do both, as one piece of work: what waits for its turn is the body as it came."""
        return self.submit(self.check(raw), compiles=compiles)


# The choices, or the grammar that has to be compiled before.
_Submitted = Generation | StructuredOutput


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


def cancel_all(handles: Sequence[ServedHandle]) -> None:
    """Cancel requests; those that have ended are not touched."""
    for handle in handles:
        handle.cancel()


def _cancel_submitted(made: _Submitted) -> None:
    """Cancel what a thread submitted after its client had gone."""
    if isinstance(made, Generation):
        cancel_all(made.handles)


async def _submit_body(context: ServerContext, incoming: _Incoming, raw: bytes) -> Generation:
    """Check and submit: here if it is quick, else in a thread.

    A long body waits for its thread as it came: parsed, it may take many times its bytes.
    """
    run = partial(context.lanes.run, undo=_cancel_submitted)
    if len(raw) <= LONG_BODY_BYTES:
        order = incoming.check(raw)
        if _is_quick(order):
            made = incoming.submit(order)
        else:
            lane = lane_of(order.prompt_chars + order.choices * CHARS_OF_CHOICE)
            made = await run(lane, partial(incoming.submit, order, compiles=False))
        del order
    else:
        lane = lane_of(len(raw))
        made = await run(lane, partial(incoming.check_and_submit, raw, compiles=False))
    if isinstance(made, StructuredOutput):
        await context.lanes.run(Lane.GRAMMARS, context.engine.compile_grammar, made)
        made = await run(lane, incoming.check_and_submit, raw)
    assert isinstance(made, Generation)
    return made


def _is_quick(order: GenerationOrder) -> bool:
    """Whether submitting may hold the event loop: a thread would cost a short prompt more."""
    return (
        not order.is_rendered
        and order.spec.sampling.structured is None  # a grammar may take long to compile
        and order.prompt_chars <= LONG_PROMPT_CHARS
        and order.choices <= MANY_CHOICES
    )


async def _read_and_submit(
    request: web.Request, endpoint: Endpoint, cleanup: contextlib.ExitStack
) -> Generation:
    """Read a body and submit what it orders; while overloaded it is not even parsed.

    What it takes is counted until its prompts are token ids, or longer if the reply needs it.
    """
    context = request.app[SERVER]
    incoming = _Incoming(request, endpoint)
    async with json_body(request) as raw:
        context.engine.check_load(incoming.rules.tenant.name)
        context.begin_generation()
        cleanup.callback(context.end_generation)
        logger.debug("%s: %s %s", request[REQUEST_ID], endpoint.path, incoming.reply_id)
        generation = await _submit_body(context, incoming, raw)
        cleanup.callback(cancel_all, generation.handles)
        if generation.order.keeps_body:
            cleanup.callback(context.body_memory.keep(len(raw)))
    return generation


async def respond(request: web.Request, endpoint: Endpoint) -> web.StreamResponse:
    """Handle one generating request from its body to the end of its reply.

    However this ends (reply sent, error, client gone), everything submitted has ended or is
    cancelled afterwards.
    """
    with contextlib.ExitStack() as cleanup:
        generation = await _read_and_submit(request, endpoint, cleanup)
        request[GENERATION] = generation
        request[HANDLES] = generation.handles
        if generation.order.spec.stream is not None:
            return await stream_reply(request, generation)
        return await _whole_reply(request.app[SERVER], generation)


async def _whole_reply(context: ServerContext, generation: Generation) -> web.Response:
    """Wait for every choice and send one JSON object."""
    completions: list[Completion] = []
    for handle in generation.handles:
        completions.append(await handle)
    if sum(map(_shown_tokens, completions)) <= LONG_REPLY_TOKENS:
        return web.json_response(_whole_payload(generation, completions))

    def encode() -> str:
        return long_json(_whole_payload(generation, completions))

    return web.json_response(text=await context.lanes.run(Lane.REPLIES, encode))


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
