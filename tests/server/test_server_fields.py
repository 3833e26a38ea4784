"""Fields beyond OpenAI's: done, or refused by name; numbers as JSON has them; sampling defaults."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import FakeEngine
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from running_server import RunningServer, StartServer

from flowprefill.errors import ConfigError, PromptTooLong
from flowprefill.request import SLO, Request, StructuredOutput
from flowprefill.server.openai.foreign_fields import (
    FOREIGN,
    HARMLESS,
    NOT_OF_CHAT,
    NOT_OF_COMPLETIONS,
    NOT_OF_EMBEDDINGS,
)
from flowprefill.server.openai.openai_schema import REFUSED
from flowprefill.server.options import ServerOptions

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
USER = [{"role": "user", "content": "Hi"}]
BASE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hi"}, CHAT: {"messages": USER}, EMBEDDINGS: {"input": "Hi"},
}  # fmt: skip
OWN = {COMPLETIONS: NOT_OF_COMPLETIONS, CHAT: NOT_OF_CHAT, EMBEDDINGS: NOT_OF_EMBEDDINGS}


def sampled(server: RunningServer, engine: FakeEngine, path: str, **fields: Any) -> Any:
    reply = server.post(path, {**BASE[path], **fields})
    assert reply.status == 200, reply.body
    return engine.submitted[-1].request.sampling


@pytest.mark.parametrize("path", BASE)
def test_every_field_that_is_not_done_is_refused_by_name(server: RunningServer, path: str) -> None:
    table = {n: v for n, v in (REFUSED | FOREIGN | OWN[path]).items() if n not in BASE[path]}
    for name in table:
        reply = server.post(path, {**BASE[path], name: ["a value", 7]})
        assert (reply.status, reply.error["param"]) == (400, name)
        assert name in reply.error["message"]
    for index in range(max(map(len, table.values()))):
        neutral = {name: values[index] for name, values in table.items() if index < len(values)}
        reply = server.post(path, {**dict.fromkeys(table), **neutral, **BASE[path]})
        assert reply.status == 200, reply.body
    assert len(FOREIGN) > 200


TYPOS: list[tuple[str, dict[str, Any], str, str]] = [
    (COMPLETIONS, {"temperatures": 0}, "temperatures", "temperature"),
    (COMPLETIONS, {"max_token": 5}, "max_token", "max_tokens"),
    (COMPLETIONS, {"topP": 0.5}, "topP", "top_p"),
    (CHAT, {"maxCompletionTokens": 5}, "maxCompletionTokens", "max_completion_tokens"),
    (CHAT, {"tool-choice": "none"}, "tool-choice", "tool_choice"),
    (
        CHAT, {"stream": True, "stream_options": {"include_usages": True}},
        "stream_options.include_usages", "include_usage",
    ),
    (
        CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "nme": 1}}},
        "response_format.json_schema.nme", "name",
    ),
    (EMBEDDINGS, {"poolin": "mean"}, "poolin", "pooling"),
    ("/tokenize", {"prompt": "Hi", "add_special_token": False}, "add_special_token",
     "add_special_tokens"),
    ("/detokenize", {"tokens": [72], "models_": "a"}, "models_", "model"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "param", "meant"), TYPOS)
def test_unknown_field_is_refused_and_the_one_that_was_meant_named(
    server: RunningServer, engine: FakeEngine, path: str, fields: dict[str, Any],
    param: str, meant: str,
) -> None:  # fmt: skip
    reply = server.post(path, {**BASE.get(path, {}), **fields})
    assert (reply.status, reply.error["code"]) == (400, "unknown_parameter")
    assert reply.error["param"] == param
    assert reply.error["message"].startswith(f"{param}: no such field, did you mean {meant}?")
    assert not engine.submitted


def test_all_unknown_fields_are_named_up_to_five(server: RunningServer) -> None:
    many = {f"{letter * 300}": 1 for letter in "qxzwj"} | {"colour": 1, "nothing": None}
    message = server.post(COMPLETIONS, {"prompt": "Hi", **many}).error["message"]
    assert message.count("no such field") == 5
    assert len(message) < 700
    assert "--unknown-fields ignore" in message
    two = server.post(COMPLETIONS, {"prompt": "Hi", "colour": 1, "flavor": 2}).error["message"]
    assert two.startswith("colour: no such field; flavor: no such field (")


def test_unknown_fields_are_logged_once_where_the_server_is_told_to_ignore_them(
    engine: FakeEngine, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(engine, unknown_fields="ignore")
    for path, body in BASE.items():
        for _ in range(3):
            assert server.post(path, {**body, path[-5:]: 1, "x" * 500: 1}).status == 200
    told = [r.getMessage() for r in caplog.records if "unknown field" in r.getMessage()]
    assert [line[:80] for line in told[:2]] == [
        "/v1/completions: ignoring unknown field 'tions'",
        f"/v1/completions: ignoring unknown field '{'x' * 500}"[:80],
    ]
    assert len(told) == 3  # of chats' path the end is the same
    assert max(map(len, told)) < 200
    with pytest.raises(ConfigError, match="unknown_fields: got 'warn', expected one of refuse, ig"):
        ServerOptions(unknown_fields="warn")


@pytest.mark.parametrize("path", [*BASE, "/v1/responses"])
def test_fields_that_change_no_answer_are_let_through(server: RunningServer, path: str) -> None:
    body = BASE.get(path, {"input": "Hi"})
    reply = server.post(path, {**body, **{name: {"a": ["value"]} for name in HARMLESS}})
    assert reply.status == 200, reply.body


CLIENT_FIELDS = {
    COMPLETIONS: completion_create_params.CompletionCreateParamsBase,
    CHAT: chat_create_params.CompletionCreateParamsBase,
    EMBEDDINGS: embedding_create_params.EmbeddingCreateParams,
    "/v1/responses": response_create_params.ResponseCreateParamsBase,
}


@pytest.mark.parametrize("path", CLIENT_FIELDS)
def test_every_field_of_the_openai_client_is_known(server: RunningServer, path: str) -> None:
    """Done, refused by its value, or harmless; never told to be no field."""
    names = CLIENT_FIELDS[path].__annotations__
    assert len(names) >= 5
    for name in names:
        reply = server.post(path, {**BASE.get(path, {"input": "Hi"}), name: {"a": "value"}})
        if reply.status != 200:
            assert (reply.error["code"], reply.error["param"]) != ("unknown_parameter", name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_beams", 1.0), ("repeat_penalty", 1.0), ("mirostat", 0), ("lora", []), ("options", {})],
)
def test_neutral_numbers_are_compared_as_numbers(
    server: RunningServer, name: str, value: Any
) -> None:
    assert server.post(COMPLETIONS, {"prompt": "Hi", name: value}).status == 200
    assert server.post(COMPLETIONS, {"prompt": "Hi", name: True}).status == 400


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_whole_floats_are_integers(server: RunningServer, engine: FakeEngine, path: str) -> None:
    sampling = sampled(
        server, engine, path, max_tokens=4.0, min_tokens=1.0, top_k=3.0, seed=7.0, n=1.0,
        stop_token_ids=[5.0, 6], priority=-2.0,
    )  # fmt: skip
    assert sampling.max_tokens == 4
    assert type(sampling.max_tokens) is int
    assert (sampling.min_tokens, sampling.top_k, sampling.seed) == (1, 3, 7)
    assert sampling.stop_token_ids == (5, 6)
    assert engine.submitted[-1].request.priority == -2
    for name, value in (("max_tokens", 4.5), ("max_tokens", 1e300), ("seed", 0.5)):
        reply = server.post(path, {**BASE[path], name: value})
        assert (reply.status, reply.error["param"]) == (400, name)


def test_token_ids_may_be_whole_floats(server: RunningServer, engine: FakeEngine) -> None:
    for prompt in ([72.0, 105], [[72, 105.0]]):
        assert server.post(COMPLETIONS, {"prompt": prompt}).status == 200
        assert engine.submitted[-1].request.prompt == [72, 105]
    assert server.post("/detokenize", {"tokens": [72.0]}).json() == {"prompt": "H"}
    assert server.post(COMPLETIONS, {"prompt": [72.5]}).error["param"] == "prompt[0]"


def test_top_p_0_is_the_narrowest_nucleus(server: RunningServer, engine: FakeEngine) -> None:
    assert sampled(server, engine, COMPLETIONS, top_p=0).top_p == 0
    assert sampled(server, engine, CHAT, top_p=0.0).top_p == 0


DEFAULTS: dict[str, Any] = {
    "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1,
    "max_new_tokens": 9, "stop_strings": ("</a>",),
}  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_models_sampling_defaults_hold_where_a_request_names_none(
    server: RunningServer, engine: FakeEngine, path: str
) -> None:
    engine.sampling_defaults = dict(DEFAULTS)
    sampling = sampled(server, engine, path)
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        assert getattr(sampling, name) == DEFAULTS[name]
    assert sampling.max_tokens == 9
    own = sampled(server, engine, path, temperature=0, top_k=0, top_p=1, max_tokens=5)
    assert (own.temperature, own.top_k, own.top_p, own.min_p) == (0, 0, 1, 0.05)
    assert own.max_tokens == 5
    assert sampled(server, engine, path, max_tokens=50).max_tokens == 9
    assert (sampling.stop, own.stop) == (("</a>",), ("</a>",))
    assert sampled(server, engine, path, stop="x").stop == ("x",)
    assert sampled(server, engine, path, stop=[]).stop == ()


def test_the_models_sampling_defaults_can_be_switched_off(
    engine: FakeEngine, start_server: StartServer
) -> None:
    engine.sampling_defaults = dict(DEFAULTS)
    server = start_server(engine, generation_config="none")
    sampling = sampled(server, engine, CHAT)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert sampling.max_tokens is None
    with pytest.raises(
        ConfigError, match="generation_config: got 'vllm', expected one of auto, none"
    ):
        ServerOptions(generation_config="vllm")


class SeeingEngine(FakeEngine):
    """Keeps what the chat template is given."""

    def render_chat(self, messages: list[dict[str, Any]], /, **variables: Any) -> str:
        self.seen = messages, variables
        return "prompt"


def test_the_template_gets_all_of_a_message(start_server: StartServer) -> None:
    engine = SeeingEngine()
    server = start_server(engine)
    answer = {
        "role": "assistant", "content": None, "reasoning_content": "why", "refusal": None,
        "own": {"a": [1]},
    }  # fmt: skip
    messages = [*USER, answer, {"role": "assistant", "content": "b", "thinking": "t"}, *USER]
    body = {"messages": messages, "reasoning_effort": "low", "documents": [{"text": "d"}]}
    assert server.post(CHAT, body).status == 200
    seen, variables = engine.seen
    assert seen == messages
    assert variables["reasoning_effort"] == "low"
    assert variables["documents"] == [{"text": "d"}]


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, None),
        ({"enable_thinking": False}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "high", "enable_thinking": False}, False),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, True),
    ],
)
def test_how_much_to_think_reaches_templates_of_either_kind(
    start_server: StartServer, fields: dict[str, Any], thinks: bool | None
) -> None:
    engine = SeeingEngine()
    server = start_server(engine)
    assert server.post(CHAT, {"messages": USER, **fields}).status == 200
    assert engine.seen[1].get("enable_thinking") is thinks
    effort = fields.get("reasoning_effort")
    assert engine.seen[1].get("thinking") is (None if effort is None else effort != "none")
    if "chat_template_kwargs" not in fields and "enable_thinking" not in fields:
        body = {"input": "Hi", "reasoning": {"effort": effort, "summary": "auto"}}
        assert server.post("/v1/responses", body).status == 200
        assert engine.seen[1].get("enable_thinking") is thinks


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_right_in_response_format_is_enforced(
    server: RunningServer, engine: FakeEngine, kind: str
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for form in ({"schema": schema}, {"json_schema": {"name": "a", "schema": schema}}):
        sampling = sampled(server, engine, CHAT, response_format={"type": kind, **form})
        assert sampling.structured == StructuredOutput.from_schema(schema)
    reply = server.post(CHAT, {"messages": USER, "response_format": {"type": kind, "schema": 5}})
    assert (reply.status, reply.error["param"]) == (400, "response_format.schema")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 400 + ".0"])
def test_a_number_that_no_reply_could_repeat_is_refused(server: RunningServer, number: str) -> None:
    for path in (CHAT, "/v1/responses"):
        field = "messages" if path == CHAT else "input"
        text = json.dumps({field: USER, "metadata": {"a": "NUMBER"}}).replace('"NUMBER"', number)
        for padded in (text, text[:-1] + ', "pad": [' + "1.5," * 60_000 + "1]}"):
            reply = server.post(path, padded.encode())
            assert (reply.status, reply.error["param"]) == (400, "body")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": 7}]}, "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "content": "a", "reasoning_content": 7}]},
            "messages[0].reasoning_content",
        ),
        ({"documents": [5]}, "documents[0]"),
        ({"documents": {}}, "documents"),
        ({"reasoning_effort": 5}, "reasoning_effort"),
    ],
)
def test_what_the_template_gets_is_checked(
    server: RunningServer, change: dict[str, Any], param: str
) -> None:
    reply = server.post(CHAT, {"messages": USER, **change})
    assert (reply.status, reply.error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("path", "body", "theirs", "written"),
    [
        (COMPLETIONS, {"prompt": "a"}, "prompt", "prompt"),
        (COMPLETIONS, {"prompt": ["a", "LONG"], "n": 2}, "prompt", "prompt[1]"),
        (COMPLETIONS, {"prompt": "a"}, "max_tokens", "max_tokens"),
        (EMBEDDINGS, {"input": "a"}, "prompt", "input"),
        (EMBEDDINGS, {"input": ["a", "b", "LONG"]}, "prompt", "input[2]"),
        (CHAT, {"messages": USER}, "prompt", "messages"),
        (CHAT, {"messages": USER, "max_tokens": 9}, "max_tokens", "max_tokens"),
        (CHAT, {"messages": USER, "max_completion_tokens": 9}, "max_tokens",
         "max_completion_tokens"),
        ("/v1/responses", {"input": "a"}, "prompt", "input"),
        ("/v1/responses", {"input": "a"}, "messages", "input"),
        ("/v1/responses", {"input": "a"}, "max_tokens", "max_output_tokens"),
        ("/v1/responses", {"input": "a"}, "response_format.json_schema.schema",
         "text.format.schema"),
    ],
)  # fmt: skip
def test_error_of_the_engine_names_the_field_as_it_was_written(
    server: RunningServer, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch,
    path: str, body: dict[str, Any], theirs: str, written: str,
) -> None:  # fmt: skip
    submit, is_one_of_several = engine.submit, "LONG" in str(body)

    def submit_or_refuse(request: Request, slo: SLO | None = None) -> Any:
        prompt = request.prompt
        text = prompt if isinstance(prompt, str) else engine.tokenizer.decode(prompt)
        if is_one_of_several and "LONG" not in text:
            return submit(request, slo)
        raise PromptTooLong(f"{theirs}: got 9, expected at most 8", param=theirs)

    monkeypatch.setattr(engine, "submit", submit_or_refuse)
    reply = server.post(path, body)
    assert (reply.status, reply.error["param"]) == (400, written)
    assert reply.error["message"] == f"{written}: got 9, expected at most 8"
    assert reply.error["code"] == "context_length_exceeded"
