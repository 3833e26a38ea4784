"""/v1/responses: OpenAI's newer endpoint, made of the same parts as chats.

Replies are kept in memory, so many of them as the settings say: for ``previous_response_id``, and
to be fetched and deleted by their ids.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from aiohttp import web

from flowprefill.errors import InvalidRequest
from flowprefill.request import Completion
from flowprefill.server.context import SERVER
from flowprefill.server.http.body import Body
from flowprefill.server.lanes import Lane
from flowprefill.server.openai.chat import ChatEndpoint, order_of_chat, whole_call
from flowprefill.server.openai.endpoint import EventWriter, Generation, GenerationOrder
from flowprefill.server.openai.generation import respond
from flowprefill.server.openai.message import MessagePart, read_whole
from flowprefill.server.openai.openai_schema import SchemaContext
from flowprefill.server.openai.replies import long_json, usage_object
from flowprefill.server.openai.written_names import as_written
from flowprefill.server.responses.response_events import ResponseWriter, output_items
from flowprefill.server.responses.response_input import (
    REFUSED,
    chat_fields,
    input_messages,
    written_names,
)
from flowprefill.server.responses.response_store import ResponseStore

SHOWN = (
    "instructions", "max_output_tokens", "parallel_tool_calls", "previous_response_id", "text",
    "tool_choice", "tools", "metadata",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "metadata": {},
    "text": {"format": {"type": "text"}},
}  # fmt: skip


class ResponseReply:
    """One request's reply: what it repeats of the body, and what it keeps of the chat."""

    def __init__(
        self,
        body: Body,
        messages: list[dict[str, Any]],
        store: ResponseStore | None,
        tenant: str,
    ) -> None:
        self._shown = {name: body.raw(name, DEFAULTS.get(name)) for name in SHOWN}
        self._messages = messages
        self._store, self._tenant = store, tenant

    def payload(
        self, generation: Generation, status: str, items: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the response object as it stands."""
        envelope, sampling = generation.envelope, generation.order.spec.sampling
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": envelope.id,
            "object": "response",
            "created_at": envelope.created,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "model": envelope.model,
            "output": items,
            "store": self._store is not None,
            "usage": None,
            **self._shown,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }

    def ended(
        self, generation: Generation, whole: MessagePart, items: list[dict[str, Any]],
        finish_reason: str | None, output_tokens: int, reasoning_tokens: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the whole response, and keep its chat."""
        payload = self.payload(generation, _status(finish_reason), items)
        usage = usage_object(generation.handles, 1, output_tokens)
        payload["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            # OpenAI's types require both; nothing is charged for what the prefix cache keeps.
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }
        if generation.order.spec.return_metrics:
            payload |= generation.metrics([output_tokens])
        if self._store is not None:
            messages = [*self._messages, _as_message(whole)]
            self._store.put(messages, payload, self._tenant)
        return payload

    def whole(self, generation: Generation, completions: list[Completion]) -> dict[str, Any]:
        """Return the reply that is not streamed, of the only choice."""
        (completion,) = completions
        parser = generation.order.parser()
        part, reasoning = read_whole(parser, completion.text, completion.tokens)
        items = output_items(generation.envelope.id, part, _status(completion.finish_reason))
        tokens = len(completion.tokens)
        return self.ended(generation, part, items, completion.finish_reason, tokens, reasoning or 0)

    def writer(self, generation: Generation) -> EventWriter:
        """Return what writes the stream."""
        return ResponseWriter(generation, self.payload, self.ended)


def _status(finish_reason: str | None) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


def _as_message(whole: MessagePart) -> dict[str, Any]:
    """Return the reply as the assistant's message of the chat."""
    calls = [whole_call(call) for call in whole.calls]
    message: dict[str, Any] = {"role": "assistant", "content": whole.content}
    if calls:
        message |= {"content": whole.content or None, "tool_calls": calls}
    return message | ({"reasoning_content": whole.reasoning} if whole.reasoning else {})


class ResponsesEndpoint(ChatEndpoint):
    """The response shapes; what it reads is a chat's body after a translation."""

    path = "/v1/responses"
    id_prefix = "resp_"
    reply_object = "response"

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def order(self, body: Body, context: SchemaContext, max_choices: int) -> GenerationOrder:
        """Translate the body and check it as a chat's."""
        body.only_neutral(REFUSED, "this field is not supported here")
        tenant = context.rules.tenant.name
        previous, instructions = body.text("previous_response_id"), body.text("instructions")
        earlier = [] if previous is None else self._store.get(previous, tenant)
        given, names = input_messages(body, len(earlier) + bool(instructions))
        messages = [*earlier, *given]
        store = self._store if body.boolean("store", True) else None
        reply = ResponseReply(body, messages, store, tenant)
        if instructions:
            messages = [{"role": "system", "content": instructions}, *messages]
        chat = Body(chat_fields(body, body.fields, messages))
        names |= written_names(body.fields)
        try:
            order = order_of_chat(chat, context, max_choices)
        except InvalidRequest as error:
            raise as_written(error, names) from None
        body.accept(chat.known - REFUSED.keys())
        return dataclasses.replace(
            order, whole=reply.whole, writer=reply.writer, names=names, keeps_body=True
        )


async def responses(request: web.Request) -> web.StreamResponse:
    """Handle POST /v1/responses."""
    return await respond(request, ResponsesEndpoint(request.app[SERVER].responses))


async def get_response(request: web.Request) -> web.Response:
    """Handle GET /v1/responses/{id}."""
    context = request.app[SERVER]
    tenant = context.rules_for(request.headers, request.remote).tenant.name
    if request.query.get("stream", "false") != "false":
        raise InvalidRequest.field("stream", request.query["stream"], "false: a reply is whole")
    reply = context.responses.reply(request.match_info["id"], tenant)
    return web.json_response(text=await context.lanes.run(Lane.REPLIES, long_json, reply))


async def delete_response(request: web.Request) -> web.Response:
    """Handle DELETE /v1/responses/{id}."""
    context = request.app[SERVER]
    tenant = context.rules_for(request.headers, request.remote).tenant.name
    context.responses.remove(request.match_info["id"], tenant)
    gone = {"id": request.match_info["id"], "object": "response", "deleted": True}
    return web.json_response(gone)
