"""Streaming replies: tokens of one or more choices to server-sent events; called by generation.py.

One event per token, except that a token whose text is not final yet (part of a character, or
perhaps the start of a stop string) goes out with the next one that has text. So the first event
always has text, and every tool measures the same time to first token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from flowprefill.request import FinishReason, Token
from flowprefill.server.context import IS_CLIENT_GONE, REQUEST_ID, SERVER
from flowprefill.server.engine_protocol import ServedHandle
from flowprefill.server.http.error_middleware import shown_error
from flowprefill.server.http.sse import EventStream
from flowprefill.server.openai.endpoint import Generation
from flowprefill.server.openai.logprobs import begun_chars
from flowprefill.server.openai.message import MessageParser, MessagePart, push_token
from flowprefill.server.openai.replies import total_reasoning, usage_object

logger = logging.getLogger(__name__)

# A choice's number and its next token, the error that ended it, or None at its end.
_Item = tuple[int, Token | Exception | None]
# Waits for the next item of any choice; a wait that is cancelled loses none.
_NextItem = Callable[[], Awaitable[_Item]]


@dataclass(slots=True)
class _Choice:
    """How far one choice has been sent."""

    index: int
    text_offset: int
    parser: MessageParser
    is_first: bool = True
    output_tokens: int = 0
    reasoning_tokens: int = 0
    held: list[Token] = field(default_factory=list)
    unsent: MessagePart = field(default_factory=MessagePart)


async def _pump(index: int, handle: ServedHandle, queue: asyncio.Queue[_Item]) -> None:
    """Move one choice's tokens into the queue all choices share."""
    try:
        async for token in handle:
            queue.put_nowait((index, token))
    except Exception as error:
        queue.put_nowait((index, error))
    else:
        queue.put_nowait((index, None))


@asynccontextmanager
async def _items_of(handles: list[ServedHandle]) -> AsyncIterator[_NextItem]:
    """Give what waits for the choices' items: one handle itself, or a queue that all feed."""
    if len(handles) == 1:
        tokens = aiter(handles[0])

        async def next_token() -> _Item:
            return 0, await anext(tokens, None)

        yield next_token
        return
    queue: asyncio.Queue[_Item] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(i, handle, queue)) for i, handle in enumerate(handles)]
    try:
        yield queue.get
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def stream_reply(request: web.Request, generation: Generation) -> web.StreamResponse:
    """Send every token as it comes, then usage, then the end mark.

    Before the first event an error is raised, so that it gets its own status; later it becomes an
    ``error`` event and the stream ends without the mark.
    """
    stream = EventStream(request)
    request.app[SERVER].connections.begin_stream(request.protocol, generation.handles)
    try:
        async with _items_of(generation.handles) as next_item:
            keep_alive_s = request.app[SERVER].options.keep_alive_s
            await _send_tokens(generation, stream, next_item, keep_alive_s)
    except ConnectionResetError:
        _note_gone(request)
    except Exception as error:
        if not stream.is_open:
            raise
        shown = shown_error(error, request.app[SERVER], request[REQUEST_ID])
        try:
            await stream.fail(shown)
        except ConnectionResetError:
            _note_gone(request)
    return stream.response


def _note_gone(request: web.Request) -> None:
    request[IS_CLIENT_GONE] = True
    logger.info("request %s: client gone", request[REQUEST_ID])


async def _send_tokens(
    generation: Generation,
    stream: EventStream,
    next_item: _NextItem,
    keep_alive_s: float,
) -> None:
    make_writer = generation.order.writer
    writer = ChunkWriter(generation) if make_writer is None else make_writer(generation)
    open_choices = len(generation.handles)
    while open_choices:
        try:
            async with asyncio.timeout(keep_alive_s):
                index, item = await next_item()
        except TimeoutError:
            await stream.keep_alive()
            continue
        if isinstance(item, Exception):
            raise item
        if item is None:
            open_choices -= 1
        events = writer.ending_events(index) if item is None else writer.events_of(index, item)
        for event in events:
            await stream.send(event, event.get("type", ""))
    for event in writer.closing_events():
        await stream.send(event, event.get("type", ""))
    await stream.finish(is_marked=make_writer is None)


class ChunkWriter:
    """The events of completions and chats: one a token; see EventWriter.

    Where a prompt's scores are shown, its other choices wait for the first one to have them.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._choices = [
            _Choice(index, len(generation.echo_text(index)), generation.order.parser())
            for index in range(len(generation.handles))
        ]
        shows_scores = generation.order.spec.sampling.prompt_logprobs is not None
        # Of each choice that scores its prompt and has not done so: what others have meanwhile.
        self._waiting: dict[int, list[tuple[int, Token | None]]] = {
            generation.scored(index): [] for index in range(len(self._choices)) if shows_scores
        }

    def events_of(self, index: int, token: Token) -> list[dict[str, Any]]:
        """Return the events this token completes; none while what it is part of is not final."""
        return self._in_turn(index, token)

    def ending_events(self, index: int) -> list[dict[str, Any]]:
        """Return the only event of a choice for which nothing is generated: its prompt."""
        return self._in_turn(index, None)

    def _in_turn(self, index: int, item: Token | None) -> list[dict[str, Any]]:
        scored = self._generation.scored(index)
        if scored != index and scored in self._waiting:
            self._waiting[scored].append((index, item))
            return []
        events = self._events(index, item)
        for waiting in self._waiting.pop(index, ()):
            events += self._events(*waiting)
        return events

    def _events(self, index: int, token: Token | None) -> list[dict[str, Any]]:
        choice = self._choices[index]
        if token is None:
            return [self._event(choice, "length")] if choice.output_tokens == 0 else []
        choice.output_tokens += 1
        choice.held.append(token)
        part, is_reasoning = push_token(choice.parser, token)
        choice.unsent.add(part)
        choice.reasoning_tokens += is_reasoning
        if token.finish_reason is not None:
            choice.unsent.add(choice.parser.finish())
        elif choice.unsent.is_empty:
            return []
        return [self._event(choice, token.finish_reason)]

    def _event(self, choice: _Choice, reason: FinishReason | None) -> dict[str, Any]:
        generation = self._generation
        spec = generation.order.spec
        part = self._part_of(choice, reason)
        if spec.return_token_ids:
            part["token_ids"] = [held.token_id for held in choice.held]
        choice.is_first = False
        choice.held = []
        event = generation.envelope.wrap(generation.endpoint.chunk_object, [part])
        assert spec.stream is not None
        if spec.stream.continuous_usage:
            event["usage"] = self._usage()
        elif spec.stream.include_usage:
            event["usage"] = None
        return event

    def _part_of(self, choice: _Choice, reason: FinishReason | None) -> dict[str, Any]:
        """Return the choice's part of the event: all that was not sent yet."""
        generation = self._generation
        echoed = choice.index if choice.is_first else None
        logprobs = generation.logprobs(choice.held, choice.text_offset, echoed)
        if logprobs is not None:
            tokenizer = generation.engine.tokenizer
            choice.text_offset += sum(begun_chars(tokenizer, one) for one in choice.held)
        shown, choice.unsent = choice.unsent, MessagePart()
        if choice.is_first:
            shown.content = generation.echo_text(choice.index) + shown.content
        return {
            "index": choice.index,
            **generation.endpoint.chunk_choice(shown, logprobs, is_first=choice.is_first),
            "finish_reason": generation.finish_reason(choice.parser, reason),
        }

    def _usage(self) -> dict[str, Any]:
        output_tokens = sum(choice.output_tokens for choice in self._choices)
        reasoning = total_reasoning(
            None if choice.parser.is_thinking is None else choice.reasoning_tokens
            for choice in self._choices
        )
        handles, n = self._generation.handles, self._generation.order.spec.n
        return usage_object(handles, n, output_tokens, reasoning)

    def closing_events(self) -> list[dict[str, Any]]:
        """Return the event after the last token that carries usage and metrics, if wanted."""
        generation = self._generation
        spec = generation.order.spec
        assert spec.stream is not None
        if not (spec.stream.include_usage or spec.return_metrics):
            return []
        event = generation.envelope.wrap(generation.endpoint.chunk_object, [])
        if spec.stream.include_usage:
            event["usage"] = self._usage()
        if spec.return_metrics:
            event |= generation.metrics([choice.output_tokens for choice in self._choices])
        return [event]
