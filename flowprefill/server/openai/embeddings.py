"""POST /v1/embeddings: prompts whose answer is a vector, scheduled and admitted as any prefill."""

from __future__ import annotations

import base64
from typing import Any

from aiohttp import web

from flowprefill.request import POOLINGS, Completion, Request, SamplingParams
from flowprefill.server.engine_protocol import ServedEngine
from flowprefill.server.http.body import Body
from flowprefill.server.openai.completions import CompletionsEndpoint, read_prompts
from flowprefill.server.openai.endpoint import Generation, GenerationOrder
from flowprefill.server.openai.foreign_fields import NOT_OF_EMBEDDINGS
from flowprefill.server.openai.generation import respond
from flowprefill.server.openai.openai_schema import (
    MAX_INT,
    GenerationSpec,
    SchemaContext,
    refuse_unsupported,
    wants_metrics,
)
from flowprefill.server.slo import slo_of

ENCODINGS = ("float", "base64")


def order_of_embeddings(body: Body, context: SchemaContext, max_choices: int) -> GenerationOrder:
    """Check the whole body and return what to submit; touches no engine."""
    refuse_unsupported(body, own=("input",))
    body.only_neutral(NOT_OF_EMBEDDINGS)
    prompts = read_prompts(body, context.vocab_size, max_choices, "input")
    pooling: Any = body.text("pooling", POOLINGS[0])
    _check_word(body, "pooling", pooling, POOLINGS)
    encoding = body.text("encoding_format", ENCODINGS[0]) or ""
    _check_word(body, "encoding_format", encoding, ENCODINGS)
    dimensions = body.raw("dimensions")
    if dimensions is not None:
        body.refuse("dimensions", dimensions, "null: embeddings are as wide as the model")
    special_tokens = body.boolean("add_special_tokens", True)
    spec = _spec(body, context)

    def requests(engine: ServedEngine, reply_id: str) -> list[Request]:  # noqa: ARG001
        return [
            Request(
                prompt,
                id=reply_id if len(prompts) == 1 else f"{reply_id}-{index}",
                add_special_tokens=special_tokens,
                priority=spec.priority,
                tenant=spec.tenant,
                pooling=pooling,
            )
            for index, prompt in enumerate(prompts)
        ]

    def whole(generation: Generation, completions: list[Completion]) -> dict[str, Any]:
        return _whole(generation, completions, encoding)

    return GenerationOrder(
        spec=spec,
        requests=requests,
        choices=len(prompts),
        prompt_chars=sum(len(prompt) for prompt in prompts),
        is_rendered=False,
        echo=(),
        whole=whole,
        names={"prompt": "input"},
    )


def _check_word(body: Body, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        body.refuse(name, value, " or ".join(map(repr, allowed)))


def _spec(body: Body, context: SchemaContext) -> GenerationSpec:
    rules = context.rules
    tier = body.text("service_tier")
    return GenerationSpec(
        model=body.text("model"),
        sampling=SamplingParams(max_tokens=0),
        slo=slo_of(body, context.headers, context.config, context.service_tiers, rules),
        n=1,
        stream=None,
        return_metrics=wants_metrics(body, context.headers),
        return_token_ids=False,
        service_tier=tier if tier in context.service_tiers else None,
        priority=rules.check_priority(body.integer("priority", 0, -(2**31), MAX_INT)),
        tenant=rules.tenant.name,
    )


def _whole(generation: Generation, completions: list[Completion], encoding: str) -> dict[str, Any]:
    tokens = sum(completion.prompt_tokens for completion in completions)
    cached = sum(handle.cached_tokens for handle in generation.handles)
    payload: dict[str, Any] = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(one.embedding, encoding)}
            for index, one in enumerate(completions)
        ],
        "model": generation.envelope.model,
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }
    if generation.order.spec.return_metrics:
        payload |= generation.metrics([0] * len(completions))
    return payload


def _encoded(embedding: Any, encoding: str) -> list[float] | str:
    """Return numbers, or their bytes as float32, the lowest first, in base64."""
    if encoding == "base64":
        return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
    numbers: list[float] = embedding.tolist()
    return numbers


class EmbeddingsEndpoint(CompletionsEndpoint):
    """The embedding shapes; there are no choices and no streams."""

    path = "/v1/embeddings"
    id_prefix = "embd-"
    reply_object = "list"

    def order(self, body: Body, context: SchemaContext, max_choices: int) -> GenerationOrder:
        """See order_of_embeddings."""
        return order_of_embeddings(body, context, max_choices)


async def embeddings(request: web.Request) -> web.StreamResponse:
    """Handle POST /v1/embeddings."""
    return await respond(request, EmbeddingsEndpoint())
