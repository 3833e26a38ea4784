"""/v1/responses through the real `openai` client: whole, streamed, continued, with tools."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine, Script
from openai.types.responses import Response, ResponseStreamEvent, ToolChoiceAllowed
from pydantic import TypeAdapter
from running_server import RunningServer, StartServer

from flowprefill.errors import RequestFailed
from flowprefill.request import StructuredOutput
from flowprefill.server.responses.response_store import ResponseNotFound, ResponseStore

TOOLS: Any = [
    {"type": "function", "name": "weather", "strict": True, "parameters": {"type": "object"}},
    {"type": "function", "name": "now", "strict": True, "parameters": {"type": "object"}},
]
SUBSET = {"type": "allowed_tools", "tools": [TOOLS[0], {"type": "function", "name": "x"}]}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CALL = {"type": "function_call", "call_id": "a", "name": "now", "arguments": "{}"}
CALLS = (
    'I look.\n<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
    '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
)


def test_whole_reply(client: openai.OpenAI, engine: FakeEngine) -> None:
    reply = client.responses.create(
        model="fake-model", input="Hi", instructions="Be short.", max_output_tokens=50,
        temperature=0.5, metadata={"a": "b"},
    )  # fmt: skip
    assert (reply.status, reply.output_text, reply.object) == (
        "completed", "Hello world", "response",
    )  # fmt: skip
    assert (reply.temperature, reply.max_output_tokens, reply.metadata) == (0.5, 50, {"a": "b"})
    assert reply.usage is not None
    assert reply.usage.output_tokens == 12
    assert reply.usage.total_tokens == reply.usage.input_tokens + 12
    assert engine.rendered[0]["messages"] == [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"},
    ]  # fmt: skip
    sampling = engine.submitted[0].request.sampling
    assert (sampling.max_tokens, sampling.temperature) == (50, 0.5)


@pytest.mark.parametrize(
    "fields", [{}, {"tools": TOOLS, "tool_choice": "required"}, {"max_output_tokens": 3}]
)
def test_reply_and_every_event_have_all_that_openais_types_require(
    server: RunningServer, engine: FakeEngine, fields: dict[str, Any]
) -> None:
    """Clients that check what they get refuse what lacks a field."""
    engine.script = Script(text=CALLS if "tools" in fields else "Hello world")
    body = {"input": "Hi", **fields}
    Response.model_validate(server.post("/v1/responses", body).json(), strict=True)
    raw = server.post("/v1/responses", {**body, "stream": True}).body.decode()
    events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: ")]
    for event in events:
        EVENT.validate_python(event, strict=True)
    assert events[-1]["type"] in ("response.completed", "response.incomplete")


def test_cut_reply_is_incomplete(client: openai.OpenAI) -> None:
    reply = client.responses.create(model="fake-model", input="Hi", max_output_tokens=4)
    assert (reply.status, reply.output_text) == ("incomplete", "Hell")
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"


def test_item_that_was_cut_is_incomplete_and_those_before_it_are_not(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.chat_template = "tools <tool_call>"
    engine.script = Script(text=CALLS[:-20])
    fields: Any = {"model": "fake-model", "input": "Hi", "tools": TOOLS}
    events = list(client.responses.create(**fields, max_output_tokens=len(CALLS) - 20, stream=True))
    streamed: Any = events[-1]
    whole: Any = client.responses.create(**fields, max_output_tokens=len(CALLS) - 20)
    for reply in (streamed.response, whole):
        assert reply.status == "incomplete"
        assert [item.status for item in reply.output] == ["completed", "completed", "incomplete"]


def test_reply_tells_the_sampling_that_was_used(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.sampling_defaults = {"temperature": 0.25, "top_p": 0.5}
    reply = client.responses.create(model="fake-model", input="Hi", top_p=0.75)
    assert (reply.temperature, reply.top_p) == (0.25, 0.75)


def test_stream_builds_the_whole_reply(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.chat_template = "tools <tool_call> </think>"
    engine.script = Script(text=f"<think>Hm.</think>{CALLS}")
    stream = client.responses.create(model="fake-model", input="Hi", tools=TOOLS, stream=True)
    events: list[Any] = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events][:3] == [
        "response.created", "response.in_progress", "response.output_item.added",
    ]  # fmt: skip
    assert events[-1].type == "response.completed"
    response = events[-1].response
    assert [item.type for item in response.output] == [
        "reasoning", "message", "function_call", "function_call",
    ]  # fmt: skip
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == response.output
    for index, item in enumerate(response.output):
        texts = [e.delta for e in events if e.type.endswith(".delta") and e.output_index == index]
        ids = {e.item_id for e in events if e.type.endswith(".delta") and e.output_index == index}
        assert ids == {item.id}
        written = item.arguments if item.type == "function_call" else item.content[0].text
        assert "".join(texts) == written
    whole = client.responses.create(model="fake-model", input="Hi", tools=TOOLS)
    assert [item.type for item in whole.output] == [item.type for item in response.output]
    assert whole.usage == response.usage


def test_openai_stream_helper_reads_it(client: openai.OpenAI) -> None:
    with client.responses.stream(model="fake-model", input="Hi") as stream:
        final = stream.get_final_response()
    assert final.output_text == "Hello world"


def test_previous_response_is_continued(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.chat_template = "tools <tool_call>"
    engine.script = Script(text=CALLS)
    first = client.responses.create(
        model="fake-model", input="Weather?", tools=TOOLS, instructions="Only now."
    )
    engine.script = Script(text="Sunny.")
    call: Any = first.output[1]
    second = client.responses.create(
        model="fake-model", previous_response_id=first.id, tools=TOOLS, stream=True,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}],
    )  # fmt: skip
    last: Any = list(second)[-1]
    user, assistant, tool = engine.rendered[1]["messages"]
    assert user == {"role": "user", "content": "Weather?"}
    assert [c["function"]["name"] for c in assistant["tool_calls"]] == ["weather", "now"]
    assert tool == {"role": "tool", "content": "sunny", "tool_call_id": call.call_id}
    client.responses.create(
        model="fake-model", previous_response_id=last.response.id, input="Thanks"
    )
    assert [m["role"] for m in engine.rendered[2]["messages"]] == [
        "user", "assistant", "tool", "assistant", "user",
    ]  # fmt: skip


@pytest.mark.parametrize("is_streamed", [False, True])
def test_kept_reply_is_fetched_and_deleted(client: openai.OpenAI, is_streamed: bool) -> None:
    made: Any = client.responses.create(model="fake-model", input="Hi", stream=is_streamed)
    reply = list(made)[-1].response if is_streamed else made
    assert client.responses.retrieve(reply.id) == reply
    client.responses.delete(reply.id)
    for ask in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(reply.id)
        assert caught.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="fake-model", input="a", previous_response_id=reply.id)


def test_unstored_reply_is_not_fetched_and_no_reply_is_streamed_again(
    client: openai.OpenAI, server: RunningServer
) -> None:
    reply = client.responses.create(model="fake-model", input="Hi", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(reply.id)
    kept = client.responses.create(model="fake-model", input="Hi")
    with pytest.raises(openai.BadRequestError, match="stream"):
        client.responses.retrieve(kept.id, stream=True)


def test_replies_are_of_the_tenant_that_asked(
    engine: FakeEngine, start_server: StartServer
) -> None:
    server = start_server(engine, tenants={"a": {"key": "key-a"}, "b": {"key": "key-b"}})
    own, other, stranger = (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        for key in ("key-a", "key-b", "key-c")
    )
    reply = own.responses.create(model="fake-model", input="Hi")
    for ask in (other.responses.retrieve, other.responses.delete):
        with pytest.raises(openai.NotFoundError):
            ask(reply.id)
    assert own.responses.retrieve(reply.id) == reply
    with pytest.raises(openai.AuthenticationError):
        stranger.responses.delete(reply.id)


def test_calls_in_the_input_become_one_message(client: openai.OpenAI, engine: FakeEngine) -> None:
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [
                {"type": "reasoning_text", "text": "They want"},
                {"type": "reasoning_text", "text": " it."},
            ],
        },
        {"type": "function_call", "call_id": "a", "name": "now", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "noon"},
    ]
    engine.chat_template = "tools"
    client.responses.create(model="fake-model", input=items)
    _, assistant, _ = engine.rendered[0]["messages"]
    assert [call["id"] for call in assistant["tool_calls"]] == ["a", "b"]
    assert assistant["reasoning_content"] == "They want it."


def test_unstored_and_unknown_replies_cannot_be_continued(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    reply = client.responses.create(model="fake-model", input="Hi", store=False)
    for previous in (reply.id, "resp_none"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.create(model="fake-model", input="a", previous_response_id=previous)
        assert caught.value.code == "previous_response_not_found"


def test_format_and_named_tool_reach_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {}}
    text: Any = {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    client.responses.create(model="fake-model", input="Hi", text=text)
    assert engine.submitted[0].request.sampling.structured == StructuredOutput.from_schema(schema)
    client.responses.create(
        model="fake-model", input="Hi", tools=TOOLS,
        tool_choice={"type": "function", "name": "now"},
    )  # fmt: skip
    flat: Any = {"mode": "required", "tools": [{"type": "function", "name": "now"}]}
    reply = client.responses.create(
        model="fake-model", input="Hi", tools=TOOLS, tool_choice={"type": "allowed_tools", **flat}
    )
    assert isinstance(reply.tool_choice, ToolChoiceAllowed)
    for submitted in engine.submitted[1:]:
        wanted = submitted.request.sampling.structured
        assert wanted is not None
        assert "weather" not in wanted.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "wizard", "content": "a"}]}, "input[0].role"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": SUBSET}, "tool_choice.mode"),
        ({"tools": TOOLS, "tool_choice": {**SUBSET, "mode": "auto"}}, "tool_choice.tools[1].name"),
        ({"text": {"format": {"type": "json_schema", "schema": 5}}}, "text.format.schema"),
        ({"input": [{"type": "reasoning"}, {"role": "wizard"}]}, "input[1].role"),
        ({"input": [{"role": "wizard"}], "instructions": "Be short."}, "input[0].role"),
        ({"input": [{"type": "function_call", "name": 5}]}, "input[0].name"),
        ({"input": [CALL, {**CALL, "call_id": 5}]}, "input[1].call_id"),
        ({"input": [{"type": "function_call_output", "output": 5}]}, "input[0].output"),
        ({"reasoning_effort": 5}, "reasoning_effort"),
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"verbosity": "low", "text": {"format": {"type": "text"}}}, "verbosity"),
        ({"verbosity": "low", "text": {"verbosity": "medium"}}, "verbosity"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"input": [{"type": "reasoning", "content": "a"}, "a"]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "content": [5]}]}, "input[0].content[0]"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["x"]}, "include"),
        ({"temperature": 5}, "temperature"),
        ({"store": 1}, "store"),
    ],
)
def test_bad_field_is_named(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    reply = server.post("/v1/responses", {"input": "Hi", **fields})
    assert (reply.status, reply.error["param"]) == (400, param)
    assert reply.error["message"].startswith(param.partition("[")[0])


def test_own_fields_work_and_unknown_ones_are_refused(
    server: RunningServer, engine: FakeEngine
) -> None:
    body: dict[str, Any] = {"input": "Hi", "slo": {"ttft_ms": 250}, "top_k": 3, "user": "me"}
    assert server.post("/v1/responses", body).status == 200
    assert engine.submitted[0].slo.ttft == 0.25
    assert engine.submitted[0].request.sampling.top_k == 3
    schema = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}
    for fields, unknown in (
        ({"max_output_token": 5}, "max_output_token"),
        ({"repetition_penality": 1.5}, "repetition_penality"),
        ({"reasoning": {"efforts": "low"}}, "reasoning.efforts"),
        ({"text": {"formats": schema}}, "text.formats"),
        ({"text": {"format": {**schema, "stric": True}}}, "text.format.stric"),
    ):
        reply = server.post("/v1/responses", {**body, **fields})
        assert (reply.status, reply.error["code"]) == (400, "unknown_parameter")
        assert reply.error["param"] == unknown
        assert "did you mean" in reply.error["message"]
    assert len(engine.submitted) == 1


def test_error_in_mid_stream_ends_it(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = Script(error=RequestFailed("qkv"), error_at=3)
    with pytest.raises(openai.APIError, match="the log has it under"):
        list(client.responses.create(model="fake-model", input="Hi", stream=True))


def test_stream_events_carry_their_names(server: RunningServer) -> None:
    raw = server.post("/v1/responses", {"input": "Hi", "stream": True}).body.decode()
    for event in raw.strip().split("\n\n"):
        name, data = event.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_store_is_bounded(start_server: StartServer, engine: FakeEngine) -> None:
    store = ResponseStore(max_responses=2, max_chars=1500)
    for name, chars in (("a", 1), ("b", 1), ("c", 500), ("d", 1200)):
        store.put([{"role": "user", "content": "x" * chars}], {"id": name})
        if name == "c":
            assert store.get("b")
            assert store.get("c")
    for name in "abcd":
        with pytest.raises(ResponseNotFound):
            store.get(name)
    server = start_server(engine, max_stored_responses=0)
    first = server.post("/v1/responses", {"input": "Hi"}).json()["id"]
    reply = server.post("/v1/responses", {"input": "Hi", "previous_response_id": first})
    assert reply.status == 404


def test_a_tenant_continues_its_own_replies_only(
    start_server: StartServer, engine: FakeEngine
) -> None:
    server = start_server(engine, tenants={"a": {"key": "ka"}, "b": {"key": "kb"}})
    headers = {"Authorization": "Bearer ka"}
    first = server.post("/v1/responses", {"input": "Hi"}, headers).json()["id"]
    body = {"input": "More", "previous_response_id": first}
    assert server.post("/v1/responses", body, headers).status == 200
    assert server.post("/v1/responses", body, {"Authorization": "Bearer kb"}).status == 404
