"""Random bodies through the schemas: an order or an InvalidRequest, never anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import VOCAB, ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from flowprefill.config import EngineConfig
from flowprefill.errors import InvalidRequest
from flowprefill.request import Request
from flowprefill.server.http.body import Body, parse_json_object
from flowprefill.server.openai.chat import order_of_chat
from flowprefill.server.openai.completions import order_of_completions
from flowprefill.server.openai.endpoint import GenerationOrder
from flowprefill.server.openai.openai_schema import CHAT_ONLY, IGNORED, REFUSED, SchemaContext
from flowprefill.server.openai.structured_fields import TOP_LEVEL
from flowprefill.server.responses.response_store import ResponseStore
from flowprefill.server.responses.responses import ResponsesEndpoint

FIELDS = (
    *REFUSED, *IGNORED, "model", "n", "best_of", "temperature", "top_p", "top_k", "min_p", "seed",
    "stop", "stop_token_ids", "max_tokens", "max_completion_tokens", "min_tokens", "ignore_eos",
    "include_stop_str_in_output", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logprobs", "top_logprobs", "echo", "stream", "stream_options", "slo", "service_tier",
    "priority", "return_metrics", "return_token_ids", "add_special_tokens", "modalities",
    "chat_template_kwargs", "add_generation_prompt", "unknown", *CHAT_ONLY, *TOP_LEVEL,
    "response_format", "structured_outputs", "logit_bias", "skip_special_tokens",
    "parallel_tool_calls", "include_reasoning", "continue_final_message",
)  # fmt: skip
HEADERS = ("x-slo-ttft-ms", "x-slo-tpot-ms", "x-llm-d-slo-ttft-ms", "x-slo-class")
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, 1, 2, 5, 0.5, "text", "none", "a"])
)  # fmt: skip
KEYS = st.sampled_from(
    [
        "ttft_ms",
        "tpot_ms",
        "on_miss",
        "class",
        "include_usage",
        "type",
        "text",
        "role",
        "content",
        "json_schema",
        "schema",
        "json",
        "regex",
        "choice",
        "function",
        "name",
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5)
SENT_HEADERS = st.dictionaries(st.sampled_from(HEADERS), st.text(max_size=5), max_size=2)


def context(headers: dict[str, str]) -> SchemaContext:
    config = EngineConfig(classes={"a": {"ttft_ms": 5}})
    return SchemaContext(headers, config, {"flex": "a"}, VOCAB)


class Renders:
    """Stands in for the engine: only its chat template and tokenizer are used."""

    tokenizer = ByteTokenizer()
    max_model_len = 1000
    chat_template = ""

    def render_chat(self, messages: list[dict[str, Any]], /, **variables: Any) -> str:
        return "".join(str(message["content"]) for message in messages) or "empty"


def check(order: GenerationOrder) -> None:
    """What an order promises: requests that the engine's own checks accept."""
    requests = order.requests(Renders(), "reply")  # type: ignore[arg-type]
    assert len(requests) == order.choices
    assert all(isinstance(request, Request) for request in requests)


def check_names(error: InvalidRequest, fields: set[str]) -> None:
    """The error names one of the fields that were sent, or a part of one."""
    assert error.param
    assert error.param.split("[")[0].split(".")[0] in fields


@pytest.mark.slow
@settings(max_examples=300)
@given(body=BODIES, prompt=VALUES | st.just("Hi"), headers=SENT_HEADERS)
def test_completion_body_gives_an_order_or_a_named_field(
    body: dict[str, Any], prompt: Any, headers: dict[str, str]
) -> None:
    try:
        check(order_of_completions(Body({**body, "prompt": prompt}), context(headers), 100))
    except InvalidRequest as error:
        check_names(error, {*body, *headers, "prompt"})


@pytest.mark.slow
@settings(max_examples=300)
@given(body=BODIES, content=VALUES | st.just("Hi"), headers=SENT_HEADERS)
def test_chat_body_gives_an_order_or_a_named_field(
    body: dict[str, Any], content: Any, headers: dict[str, str]
) -> None:
    messages = [{"role": "user", "content": content}]
    try:
        check(order_of_chat(Body({**body, "messages": messages}), context(headers), 100))
    except InvalidRequest as error:
        check_names(error, {*body, *headers, "messages"})


@pytest.mark.slow
@settings(max_examples=300)
@given(body=BODIES, items=VALUES, text=VALUES, tools=VALUES, choice=VALUES)
def test_response_body_gives_an_order_or_a_named_field(
    body: dict[str, Any], items: Any, text: Any, tools: Any, choice: Any
) -> None:
    sent = {**body, "input": items, "text": text, "tools": tools, "tool_choice": choice}
    endpoint = ResponsesEndpoint(ResponseStore(10))
    try:
        check(endpoint.order(Body(sent), context({}), 100))
    except InvalidRequest as error:
        check_names(error, set(sent))


@settings(max_examples=300)
@given(raw=st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_a_bad_body(raw: bytes) -> None:
    try:
        assert isinstance(parse_json_object(raw), dict)
    except InvalidRequest as error:
        check_names(error, {"body"})


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63), 0])
def test_seed_of_every_choice_is_valid(seed: int) -> None:
    check(order_of_completions(Body({"prompt": "a", "seed": seed, "n": 3}), context({}), 100))
