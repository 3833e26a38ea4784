"""Tools, structured output and reasoning through the real `openai` client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine, Script
from pydantic import BaseModel
from running_server import RunningServer, StartServer
from transformers.utils.chat_template_utils import render_jinja_template

from flowprefill.models.chat_template import ChatTemplate
from flowprefill.request import StructuredOutput

MESSAGES: Any = [{"role": "user", "content": "Weather in Bern?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "description": "the time"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
CALLS = f'{CALL}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'


@pytest.fixture
def hermes(engine: FakeEngine) -> FakeEngine:
    engine.chat_template = "{{ tools }} <tool_call>"
    return engine


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="fake-model", messages=MESSAGES, **fields)


def allowed(*names: str, mode: str = "auto") -> Any:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_call_in_a_whole_reply(client: openai.OpenAI, hermes: FakeEngine) -> None:
    hermes.script = Script(text=f"Let me see.\n{CALLS}")
    (choice,) = ask(client, tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    first, second = choice.message.tool_calls
    assert (first.type, first.function.name) == ("function", "weather")
    assert json.loads(first.function.arguments) == {"city": "Bern"}
    assert (second.function.name, second.function.arguments) == ("now", "{}")
    assert first.id != second.id
    assert hermes.rendered[0]["tools"] == TOOLS


def test_call_in_a_stream_equals_the_whole(client: openai.OpenAI, hermes: FakeEngine) -> None:
    hermes.script = Script(text=CALLS)
    chunks = [chunk.choices[0] for chunk in ask(client, tools=TOOLS, stream=True)]
    assert chunks[0].delta.role == "assistant"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        assert not chunk.delta.content
        for call in chunk.delta.tool_calls or []:
            if call.id is not None:
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments or ""
    assert calls == {0: ["weather", '{"city": "Bern"}'], 1: ["now", "{}"]}
    assert len(chunks) > 10  # the arguments come as they are generated


def test_text_in_answer_to_tools_stays_text(client: openai.OpenAI, hermes: FakeEngine) -> None:
    hermes.script = Script(text="It is < 20 degrees.")
    (choice,) = ask(client, tools=TOOLS).choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert choice.message.content == "It is < 20 degrees."
    chunks = list(ask(client, tools=TOOLS, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "It is < 20 degrees."


def test_tool_choice_none_hides_the_tools(client: openai.OpenAI, hermes: FakeEngine) -> None:
    hermes.script = Script(text=CALL)
    (choice,) = ask(client, tools=TOOLS, tool_choice="none").choices
    assert choice.message.content == CALL
    assert "tools" not in hermes.rendered[0]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["weather", "now"]),
        ({"type": "function", "function": {"name": "now"}}, ["now"]),
        (allowed("now", "now", mode="required"), ["now"]),
        (allowed("now", "weather", mode="required"), ["weather", "now"]),
    ],
)
def test_required_and_named_are_enforced_by_a_grammar(
    client: openai.OpenAI, hermes: FakeEngine, choice: Any, names: list[str]
) -> None:
    hermes.script = Script(text=CALLS)
    ask(client, tools=TOOLS, tool_choice=choice)
    wanted = hermes.submitted[0].request.sampling.structured
    assert wanted is not None
    assert wanted.kind == "grammar"
    assert [name for name in ("weather", "now") if f'\\"{name}\\"' in wanted.text] == names


def test_of_all_tools_in_the_prompt_only_the_allowed_are_called(
    client: openai.OpenAI, hermes: FakeEngine
) -> None:
    hermes.script = Script(text=CALLS)
    for stream in (False, True):
        reply = ask(client, tools=TOOLS, tool_choice=allowed("now"), stream=stream)
        parts = [c.choices[0].delta for c in reply] if stream else [reply.choices[0].message]
        calls = [call for part in parts for call in part.tool_calls or () if call.id]
        assert [call.function.name for call in calls] == ["now"]
        assert "".join(part.content or "" for part in parts).strip() == CALL  # stays text
        assert hermes.rendered[-1]["tools"] == TOOLS
        assert hermes.submitted[-1].request.sampling.structured is None


def test_one_call_only_without_parallel_calls(client: openai.OpenAI, hermes: FakeEngine) -> None:
    hermes.script = Script(text=CALLS)
    (choice,) = ask(client, tools=TOOLS, parallel_tool_calls=False).choices
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"]


@pytest.mark.parametrize("choice", ["required", "always", {"type": "function"}, 5])
def test_tool_choice_that_names_nothing_is_refused(server: RunningServer, choice: Any) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "tool_choice": choice}
    if choice != "required":
        body["tools"] = TOOLS
    reply = server.post("/v1/chat/completions", body)
    assert (reply.status, reply.error["param"]) == (400, "tool_choice")


def test_history_with_calls_reaches_the_template(client: openai.OpenAI, hermes: FakeEngine) -> None:
    call = {"id": "c1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}  # fmt: skip
    history: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    client.chat.completions.create(model="fake-model", messages=history, tools=TOOLS)
    _, assistant, tool = hermes.rendered[0]["messages"]
    assert assistant["tool_calls"][0]["function"] == {
        "name": "weather", "arguments": {"city": "Bern"},
    }  # fmt: skip
    assert (tool["role"], tool["content"], tool["tool_call_id"]) == ("tool", "sunny", "c1")


def test_template_without_tools_gets_them_as_text(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.script = Script(text='{"name": "weather", "arguments": {"city": "Bern"}}')
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    history: Any = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    (choice,) = client.chat.completions.create(
        model="fake-model", messages=history, tools=TOOLS
    ).choices
    assert choice.message.tool_calls is not None
    system, _, assistant, result = engine.rendered[0]["messages"]
    assert '"name": "weather"' in system["content"]
    assert assistant["content"] == '{"name": "now", "arguments": {}}'
    assert result == {"role": "user", "content": "Result of c1: noon"}


# ---- structured output -------------------------------------------------------------------------


class Person(BaseModel):
    name: str
    age: int


def test_pydantic_model_is_parsed(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = Script(text='{"name": "Ada", "age": 36}')
    parsed = client.chat.completions.parse(
        model="fake-model", messages=MESSAGES, response_format=Person
    )
    assert parsed.choices[0].message.parsed == Person(name="Ada", age=36)
    wanted = engine.submitted[0].request.sampling.structured
    assert wanted is not None
    assert wanted.kind == "json_schema"
    assert list(json.loads(wanted.text)["properties"]) == ["name", "age"]


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, StructuredOutput("json_object")),
        ({"guided_json": SCHEMA}, StructuredOutput.from_schema(SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, StructuredOutput.from_schema(SCHEMA)),
        ({"guided_regex": "a+"}, StructuredOutput("regex", "a+")),
        ({"guided_choice": ["a", "b"]}, StructuredOutput.from_choices(["a", "b"])),
        ({"guided_grammar": 'start: "a"'}, StructuredOutput("grammar", 'start: "a"')),
        ({"ebnf": 'root ::= "a"'}, StructuredOutput("grammar", 'root ::= "a"')),
        ({"structured_outputs": {"regex": "b"}}, StructuredOutput("regex", "b")),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutput.from_schema(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, StructuredOutput("json_object")),
        ({"structured_outputs": {"choice": ["c"]}}, StructuredOutput.from_choices(["c"])),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_name_for_structured_output(
    server: RunningServer,
    engine: FakeEngine,
    path: str,
    fields: dict[str, Any],
    expected: StructuredOutput,
) -> None:
    prompt = {"prompt": "Hi"} if path == "/v1/completions" else {"messages": MESSAGES}
    reply = server.post(path, {**prompt, **fields})
    assert reply.status == 200, reply.body
    assert engine.submitted[0].request.sampling.structured == expected


def test_tools_and_a_response_format_are_refused_together(server: RunningServer) -> None:
    body = {"messages": MESSAGES, "tools": TOOLS, "response_format": {"type": "json_object"}}
    reply = server.post("/v1/chat/completions", body)
    assert (reply.status, reply.error["param"]) == (400, "response_format")


def test_bias_and_special_tokens_reach_the_engine(
    server: RunningServer, engine: FakeEngine
) -> None:
    body = {"prompt": "Hi", "logit_bias": {"65": -5, "257": 2.5}, "skip_special_tokens": False}
    assert server.post("/v1/completions", body).status == 200
    sampling = engine.submitted[0].request.sampling
    assert sampling.logit_bias == {65: -5, 257: 2.5}
    assert not sampling.skip_special_tokens


# ---- reasoning and continued messages ----------------------------------------------------------


@pytest.fixture
def thinks(engine: FakeEngine) -> FakeEngine:
    engine.chat_template = "</think>"
    engine.script = Script(text="<think>\nShort.\n</think>\n\nYes.")
    return engine


def test_reasoning_is_a_field_of_its_own(client: openai.OpenAI, thinks: FakeEngine) -> None:
    message = ask(client).choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "Short.")
    deltas = [chunk.choices[0].delta for chunk in ask(client, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    shown = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert shown == "Short."


def test_usage_tells_the_tokens_of_reasoning(client: openai.OpenAI, thinks: FakeEngine) -> None:
    thought = len("<think>\nShort.\n</think>") - len("<think")  # until its mark is whole: unknown
    usages = [ask(client).usage]
    options = {"include_usage": True}
    usages.append(list(ask(client, stream=True, stream_options=options))[-1].usage)
    for usage in usages:
        assert usage.completion_tokens == len(thinks.script.text) + 1
        assert usage.completion_tokens_details.reasoning_tokens == thought
    asked = {"model": "fake-model", "input": "Hi"}
    whole = client.responses.create(**asked)
    last = list(client.responses.create(**asked, stream=True))[-1].response
    for reply in (whole, last):
        assert reply.usage.output_tokens_details.reasoning_tokens == thought


def test_reasoning_may_be_left_out_or_unparsed(
    start_server: StartServer, client: openai.OpenAI, thinks: FakeEngine
) -> None:
    message = ask(client, extra_body={"include_reasoning": False}).choices[0].message
    assert message.content == "Yes."
    assert not hasattr(message, "reasoning_content")
    plain = start_server(thinks, reasoning_parser="none")
    body = plain.post("/v1/chat/completions", {"messages": MESSAGES}).json()
    assert body["choices"][0]["message"]["content"] == thinks.script.text


def test_structure_begins_after_the_reasoning(client: openai.OpenAI, thinks: FakeEngine) -> None:
    ask(client, response_format={"type": "json_object"})
    wanted = thinks.submitted[0].request.sampling.structured
    assert wanted == StructuredOutput("json_object", after="</think>")


def test_final_message_is_continued(client: openai.OpenAI, engine: FakeEngine) -> None:
    history: Any = [*MESSAGES, {"role": "assistant", "content": "It is "}]
    client.chat.completions.create(
        model="fake-model", messages=history, extra_body={"continue_final_message": True}
    )
    assert engine.submitted[0].request.prompt == "<user>Weather in Bern?<assistant>It is "
    for mark in ("prefix", "partial"):  # as Mistral and Moonshot ask for it
        marked: Any = [*MESSAGES, {"role": "assistant", "content": "It is", mark: True}]
        client.chat.completions.create(model="fake-model", messages=marked)
        prompt = engine.submitted[-1].request.prompt
        assert prompt == "<user>Weather in Bern?<assistant>It is"


class TemplateEngine(FakeEngine):
    """Renders with a real template."""

    def render_chat(self, messages: list[dict[str, Any]], /, **variables: Any) -> str:
        return ChatTemplate(self.chat_template).render(messages, **variables)


@pytest.mark.parametrize("content", ["It is", "It is ", "\n It is\n", "a b a", "{}"])
@pytest.mark.parametrize(
    "written",
    ["m.content", "m.content | trim", "' ' + m.content | trim + ' '", "m.content.strip() + '\n'"],
)
def test_a_message_is_continued_as_by_transformers(
    start_server: StartServer, content: str, written: str
) -> None:
    engine = TemplateEngine()
    engine.chat_template = f"{{% for m in messages %}}<{{{{ {written} }}}}></s>{{% endfor %}}"
    messages = [*MESSAGES, {"role": "assistant", "content": content}]
    body = {"messages": messages, "continue_final_message": True}
    assert start_server(engine).post("/v1/chat/completions", body).status == 200
    (expected,), _ = render_jinja_template(
        [messages], chat_template=engine.chat_template, continue_final_message=True
    )
    assert engine.submitted[0].request.prompt == expected


def test_two_ways_to_end_a_prompt_are_refused(server: RunningServer) -> None:
    body = {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True}
    reply = server.post("/v1/chat/completions", body)
    assert (reply.status, reply.error["param"]) == (400, "add_generation_prompt")


def test_tokenize_counts_the_tools(server: RunningServer, hermes: FakeEngine) -> None:
    server.post("/tokenize", {"messages": MESSAGES, "tools": TOOLS})
    assert hermes.rendered[0]["tools"] == TOOLS
