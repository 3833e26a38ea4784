"""Malformed requests: each gets its status and an error that names the field; nothing runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import WAIT_S, FakeEngine
from running_server import RunningServer, StartServer

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
NESTED = 5000

# Fields both endpoints share: (field, bad value, name in the error if it differs).
SHARED: list[tuple[str, Any, str | None]] = [
    ("model", 5, None),
    ("model", ["fake-model"], None),
    ("n", 0, None),
    ("n", 129, None),
    ("n", "2", None),
    ("n", 1.5, None),
    ("n", True, None),
    ("best_of", 3, None),
    ("temperature", -0.1, None),
    ("temperature", 2.1, None),
    ("temperature", "hot", None),
    ("temperature", True, None),
    ("temperature", [], None),
    ("temperature", 10**400, None),
    ("top_p", -0.1, None),
    ("top_p", 1.01, None),
    ("top_p", "1", None),
    ("top_k", -2, None),
    ("top_k", 1.5, None),
    ("top_k", 2**31, None),
    ("min_p", -0.1, None),
    ("min_p", 1.5, None),
    ("repetition_penalty", 0, None),
    ("repetition_penalty", 11, None),
    ("presence_penalty", 2.5, None),
    ("presence_penalty", "x", None),
    ("frequency_penalty", -2.5, None),
    ("seed", 1.5, None),
    ("seed", "7", None),
    ("seed", 2**64, None),
    ("stop", 5, None),
    ("stop", "", None),
    ("stop", ["a", ""], "stop[1]"),
    ("stop", ["a", 3], "stop[1]"),
    ("stop", ["x"] * 17, None),
    ("stop", {"a": 1}, None),
    ("stop_token_ids", 5, None),
    ("stop_token_ids", [1, 258], "stop_token_ids[1]"),
    ("stop_token_ids", [-1], "stop_token_ids[0]"),
    ("stop_token_ids", ["a"], "stop_token_ids[0]"),
    ("max_tokens", 0, None),
    ("max_tokens", -5, None),
    ("max_tokens", "10", None),
    ("max_tokens", 1.5, None),
    ("max_tokens", False, None),
    ("max_tokens", 2**31, None),
    ("min_tokens", -1, None),
    ("min_tokens", "a", None),
    ("ignore_eos", 1, None),
    ("ignore_eos", "true", None),
    ("include_stop_str_in_output", 0, None),
    ("stream", "yes", None),
    ("stream", 1, None),
    ("stream_options", {"include_usage": True}, None),
    ("stream_options", "usage", None),
    ("return_metrics", 1, None),
    ("return_token_ids", "x", None),
    ("priority", "high", None),
    ("priority", 0.5, None),
    ("service_tier", "platinum", None),
    ("service_tier", 3, None),
    ("slo", 5, None),
    ("slo", [], None),
    ("slo", {"ttft_ms": 0}, "slo.ttft_ms"),
    ("slo", {"ttft_ms": -1}, "slo.ttft_ms"),
    ("slo", {"ttft_ms": "250"}, "slo.ttft_ms"),
    ("slo", {"ttft_ms": 86_400_001}, "slo.ttft_ms"),
    ("slo", {"tpot_ms": True}, "slo.tpot_ms"),
    ("slo", {"on_miss": "ignore"}, "slo.on_miss"),
    ("slo", {"on_miss": 1}, "slo.on_miss"),
    ("slo", {"class": "unheard-of"}, "slo.class"),
    ("slo", {"class": 1}, "slo.class"),
    ("slo", {"ttft": 0.25}, "slo.ttft"),
    ("tool_choice", "required", None),
    ("functions", [{"name": "f"}], None),
    ("function_call", {"name": "f"}, None),
    ("response_format", "text", None),
    ("response_format", {"type": "xml"}, "response_format.type"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"schema": []}},
        "response_format.json_schema.schema",
    ),
    ("logit_bias", {"5": "a"}, None),
    ("logit_bias", {"five": 1}, None),
    ("logit_bias", {"258": 1}, None),
    ("logit_bias", {"5": 101}, None),
    ("logit_bias", [5], None),
    ("suffix", "end", None),
    ("guided_json", 5, None),
    ("guided_choice", [], None),
    ("guided_choice", ["a", 1], "guided_choice[1]"),
    ("guided_regex", 5, None),
    ("guided_grammar", "", None),
    ("regex", "a" * 200_000, None),
    ("structured_outputs", {}, None),
    ("structured_outputs", {"choice": "a"}, "structured_outputs.choice"),
    ("structured_outputs", {"jsn": {}}, "structured_outputs.jsn"),
    (
        "structured_outputs",
        {"regex": "a", "whitespace_pattern": " "},
        "structured_outputs.whitespace_pattern",
    ),
    ("structured_outputs", {"regex": "a", "grammar": "b"}, "structured_outputs.grammar"),
    ("use_beam_search", True, None),
    ("prompt_logprobs", 21, None),
    ("prompt_logprobs", True, None),
    ("skip_special_tokens", 0, None),
    ("modalities", ["audio"], None),
    ("add_special_tokens", 1, None),
]
COMPLETION_ONLY: list[tuple[str, Any, str | None]] = [
    ("prompt", None, None),
    ("prompt", "", None),
    ("prompt", [], None),
    ("prompt", [[]], "prompt[0]"),
    ("prompt", ["a", ""], "prompt[1]"),
    ("prompt", ["a", 1], "prompt[1]"),
    ("prompt", [1, "a"], "prompt[0]"),
    ("prompt", [1, 258], "prompt[1]"),
    ("prompt", [1, -1], "prompt[1]"),
    ("prompt", [[1], [2, 300]], "prompt[1][1]"),
    ("prompt", [[1, "a"]], "prompt[0][1]"),
    ("prompt", [1.5], "prompt[0]"),
    ("prompt", [True], "prompt[0]"),
    ("prompt", {"text": "a"}, None),
    ("prompt", 7, None),
    ("prompt", "half \ud800 pair", None),
    ("prompt", ["a"] * 1025, None),
    ("logprobs", True, None),
    ("logprobs", 21, None),
    ("logprobs", -1, None),
    ("echo", "yes", None),
    ("tools", [{"type": "function", "function": {"name": "f"}}], None),
]
CHAT_ONLY: list[tuple[str, Any, str | None]] = [
    ("messages", None, None),
    ("messages", [], None),
    ("messages", "Hi", None),
    ("messages", ["Hi"], "messages[0]"),
    ("messages", [{"content": "Hi"}], "messages[0].role"),
    ("messages", [{"role": "wizard", "content": "Hi"}], "messages[0].role"),
    ("messages", [{"role": ["user"], "content": "Hi"}], "messages[0].role"),
    ("messages", [{"role": "tool"}], "messages[0].content"),
    ("messages", [{"role": "user"}], "messages[0].content"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
    ("messages", [{"role": "user", "content": ["Hi"]}], "messages[0].content[0]"),
    (
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "messages[0].content[0].type",
    ),
    (
        "messages",
        [{"role": "user", "content": [{"type": "text"}]}],
        "messages[0].content[0].text",
    ),
    ("messages", [{"role": "user", "content": "a", "name": 5}], "messages[0].name"),
    ("messages", [{"role": "user", "content": "\udfff"}], "messages[0].content"),
    (
        "messages",
        [{"role": "assistant", "content": "a", "tool_calls": [{}]}],
        "messages[0].tool_calls[0]",
    ),
    (
        "messages",
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        "messages",
        [{"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
        "messages[0].tool_calls",
    ),
    ("tools", 5, None),
    ("tools", [{"type": "function"}], "tools[0].function"),
    ("tools", [{"type": "function", "function": {}}], "tools[0].function.name"),
    ("tools", [{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
    (
        "tools",
        [{"type": "function", "function": {"name": "a", "parameters": 5}}],
        "tools[0].function.parameters",
    ),
    ("tools", [{"type": "function", "function": {"name": "a"}}] * 2, None),
    ("parallel_tool_calls", 1, None),
    ("include_reasoning", 1, None),
    ("max_completion_tokens", 0, None),
    ("max_completion_tokens", "5", None),
    ("logprobs", 1, None),
    ("top_logprobs", 3, None),
    ("top_logprobs", 21, None),
    ("chat_template_kwargs", 5, None),
    ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs.messages"),
    ("chat_template_kwargs", {"refuse": True}, "messages"),
    ("chat_template", "{{ x }}", None),
    ("add_generation_prompt", 1, None),
    ("continue_final_message", 1, None),
]
BASE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "fake-model", "prompt": "Hi"},
    CHAT: {"model": "fake-model", "messages": [{"role": "user", "content": "Hi"}]},
}
TABLE = [
    *((COMPLETIONS, *row) for row in SHARED + COMPLETION_ONLY),
    *((CHAT, *row) for row in SHARED + CHAT_ONLY),
]


@pytest.mark.parametrize(("path", "field", "value", "named"), TABLE)
def test_bad_field_is_a_400_that_names_it(
    server: RunningServer, engine: FakeEngine, path: str, field: str, value: Any, named: str | None
) -> None:
    reply = server.post(path, {**BASE[path], field: value})
    assert reply.status == 400, reply.body
    assert reply.error["param"] == (named or field)
    assert reply.error["type"] == "invalid_request_error"
    assert (named or field) in reply.error["message"]
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"{", "not JSON at line 1"),
        (b'{"prompt": "a",}', "not JSON"),
        (b"prompt=Hi", "not JSON"),
        (b'{"prompt": "\xff\xfe"}', "UTF-8"),
        (b'{"prompt": "caf\xe9"}', "byte 15"),
        (b'\x00\x01{"prompt": "a"}', "not JSON"),
        (b'"prompt"', "a JSON object"),
        (b"[1, 2]", "a JSON object"),
        (b"null", "a JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": Infinity}', "Infinity"),
        (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "1e999 is larger than any number"),
        (b'{"prompt": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "too long"),
    ],
)
def test_bad_body_is_a_400_that_says_why(
    server: RunningServer, engine: FakeEngine, body: bytes, words: str
) -> None:
    reply = server.post(COMPLETIONS, body)
    assert reply.status == 400
    assert reply.error["param"] == "body"
    assert words in reply.error["message"]
    assert engine.submitted == []


def test_deep_but_closed_nesting_is_a_400(server: RunningServer) -> None:
    body = b'{"prompt": ' + b"[" * NESTED + b"]" * NESTED + b"}"
    assert server.post(COMPLETIONS, body).status == 400


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_wrong_content_type_is_a_400(server: RunningServer, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    reply = server.post(COMPLETIONS, json.dumps(BASE[COMPLETIONS]).encode(), headers)
    assert reply.status == 400
    assert reply.error["param"] == "content-type"
    assert content_type in reply.error["message"]


def test_other_charset_is_a_400(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json; charset=latin-1"}
    reply = server.post(COMPLETIONS, b'{"prompt": "caf\xe9"}', headers)
    assert reply.status == 400
    assert reply.error["param"] == "content-type"


@pytest.mark.parametrize("content_type", ["application/json", "application/problem+json"])
def test_json_content_types_are_read(server: RunningServer, content_type: str) -> None:
    body = json.dumps(BASE[COMPLETIONS]).encode()
    assert server.post(COMPLETIONS, body, {"Content-Type": content_type}).status == 200


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_huge_body_is_a_413(start_server: StartServer, engine: FakeEngine, path: str) -> None:
    server = start_server(engine, max_body_mib=0.01)
    reply = server.post(path, {"prompt": "x" * 20_000})
    assert reply.status == 413
    assert reply.error["code"] == "body_too_large"
    assert "0.01 MiB" in reply.error["message"]
    assert server.get("/health").status == 200


def test_huge_chunked_body_is_a_413(start_server: StartServer, engine: FakeEngine) -> None:
    server = start_server(engine, max_body_mib=0.01)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    import socket

    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
        connection.sendall(head.encode() + chunk + chunk + b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-slo-ttft-ms", "fast"),
        ("x-slo-ttft-ms", "0"),
        ("x-slo-ttft-ms", "nan"),
        ("x-slo-ttft-ms", "inf"),
        ("x-slo-tpot-ms", "-5"),
        ("x-slo-tpot-ms", ""),
        ("x-llm-d-slo-ttft-ms", "1e9"),
        ("x-llm-d-slo-tpot-ms", "5 ms"),
        ("x-slo-class", "unheard-of"),
        ("x-return-metrics", "maybe"),
    ],
)
def test_bad_header_is_a_400_that_names_it(
    server: RunningServer, engine: FakeEngine, header: str, value: str
) -> None:
    reply = server.post(COMPLETIONS, BASE[COMPLETIONS], {header: value})
    assert reply.status == 400
    assert reply.error["param"] == header
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "model": 5}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [1, 258]}, "tokens[1]"),
    ],
)
def test_bad_token_request_is_a_400(
    server: RunningServer, path: str, body: dict[str, Any], param: str
) -> None:
    reply = server.post(path, body)
    assert reply.status == 400
    assert reply.error["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}},
        {"tools": [], "functions": None, "logit_bias": {}, "suffix": None, "best_of": 1},
        {"logprobs": None, "repetition_penalty": 1.0, "stop": None, "seed": None, "n": None},
        {"top_k": -1, "min_tokens": 0, "priority": 3, "user": "me", "metadata": {"a": "b"}},
        {"stream_options": None, "slo": None, "service_tier": "auto", "modalities": ["text"]},
        {"something_new": None, "session_id": "a", "dry_base": 1.75, "cache_prompt": True},
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_neutral_and_harmless_fields_are_let_through(
    server: RunningServer, path: str, fields: dict[str, Any]
) -> None:
    reply = server.post(path, {**BASE[path], **fields})
    assert reply.status == 200, reply.body


def test_both_names_of_max_tokens_agree_or_are_refused(
    server: RunningServer, engine: FakeEngine
) -> None:
    same = {**BASE[CHAT], "max_tokens": 5, "max_completion_tokens": 5}
    assert server.post(CHAT, same).status == 200
    assert engine.submitted[0].request.sampling.max_tokens == 5
    differ = server.post(CHAT, {**same, "max_tokens": 6})
    assert differ.status == 400
    assert differ.error["param"] == "max_tokens"


def test_min_tokens_above_max_tokens_is_a_400(server: RunningServer) -> None:
    reply = server.post(COMPLETIONS, {**BASE[COMPLETIONS], "min_tokens": 9, "max_tokens": 8})
    assert reply.status == 400
    assert reply.error["param"] == "min_tokens"


def test_prompt_logprobs_of_a_stream_are_a_400(server: RunningServer) -> None:
    for path in (COMPLETIONS, CHAT):
        reply = server.post(path, {**BASE[path], "prompt_logprobs": 1, "stream": True})
        assert reply.status == 400
        assert reply.error["param"] == "prompt_logprobs"


def test_max_tokens_0_is_for_prompts_that_are_shown(server: RunningServer) -> None:
    for shown in ({"echo": True}, {"prompt_logprobs": 0}):
        assert (
            server.post(COMPLETIONS, {**BASE[COMPLETIONS], "max_tokens": 0, **shown}).status == 200
        )


def test_long_body_is_checked_like_a_short_one(server: RunningServer, engine: FakeEngine) -> None:
    prompt = [65] * 200_000
    good = server.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 1})
    assert good.json()["usage"]["prompt_tokens"] == 200_000
    bad = server.post(COMPLETIONS, {"prompt": [*prompt, 999]})
    assert bad.error["param"] == "prompt[200000]"
    assert len(engine.submitted) == 1
