"""OpenAI's client for Python: chat, streams, tools, structured output, responses, logprobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

MESSAGES: Any = [{"role": "user", "content": "What is the weather in Paris, in Celsius?"}]


class Weather(BaseModel):
    city: str = Field(max_length=20)
    unit: Literal["C", "F"]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI, model: str) -> None:
    assert [one.id for one in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model


def test_chat_whole_and_streamed_agree(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=12, temperature=0
    )
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=12, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[-1].usage == whole.usage


def test_stream_helpers_give_the_final_reply(client: openai.OpenAI, model: str) -> None:
    colour: Any = {"structured_outputs": {"choice": ["red", "blue"]}}
    with client.chat.completions.stream(
        model=model, messages=MESSAGES, extra_body=colour
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content in ("red", "blue")
    with client.responses.stream(model=model, input="The sky is", extra_body=colour) as events:
        for _ in events:
            pass
        assert events.get_final_response().output_text in ("red", "blue")


def test_tool_call_and_its_result(
    client: openai.OpenAI, model: str, weather: dict[str, Any]
) -> None:
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": weather}}]
    reply = client.chat.completions.create(
        model=model, messages=MESSAGES, tools=tools, tool_choice="required", max_tokens=200
    )
    message = reply.choices[0].message
    call: Any = (message.tool_calls or [])[0]
    assert json.loads(call.function.arguments)["unit"] in ("C", "F")
    result = {"role": "tool", "tool_call_id": call.id, "content": "17 degrees"}
    history: Any = [*MESSAGES, message, result]
    last = client.chat.completions.create(model=model, messages=history, tools=tools, max_tokens=8)
    assert last.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_parse_gives_an_object(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.parse(
        model=model, messages=MESSAGES, response_format=Weather, max_tokens=200, temperature=0
    )
    assert isinstance(reply.choices[0].message.parsed, Weather)


def test_parse_of_a_tool(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.parse(
        model=model, messages=MESSAGES, tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required", max_tokens=200, temperature=0,
    )  # fmt: skip
    (call,) = (reply.choices[0].message.tool_calls or [])[:1]
    assert isinstance(call.function.parsed_arguments, Weather)


def test_response_format_json_object(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=400,
        temperature=0, frequency_penalty=1.0,
    )  # fmt: skip
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(reply.choices[0].message.content or ""), dict)
    else:
        assert (reply.choices[0].message.content or "").lstrip().startswith("{")


def test_responses_whole_streamed_and_continued(client: openai.OpenAI, model: str) -> None:
    first = client.responses.create(
        model=model, input="Say hi.", max_output_tokens=16, temperature=0
    )
    assert first.output_text
    events = list(
        client.responses.create(
            model=model, input="Say hi.", max_output_tokens=16, temperature=0, stream=True
        )
    )
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == first.output_text
    assert events[-1].type in ("response.completed", "response.incomplete")
    second = client.responses.create(
        model=model, input="And again.", previous_response_id=first.id, max_output_tokens=16
    )
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


def test_responses_parse(client: openai.OpenAI, model: str) -> None:
    reply = client.responses.parse(
        model=model,
        input="The weather in Paris?",
        text_format=Weather,
        max_output_tokens=200,
        temperature=0,
    )
    assert isinstance(reply.output_parsed, Weather)


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    content = reply.choices[0].logprobs
    assert content is not None
    for entry in content.content or []:
        assert entry.logprob == max(one.logprob for one in entry.top_logprobs) <= 0
    text = client.completions.create(model=model, prompt="One two", max_tokens=3, logprobs=2)
    found = text.choices[0].logprobs
    assert found is not None
    assert "".join(found.tokens or []) == text.choices[0].text


def test_errors_have_their_classes(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=MESSAGES, temperature=9)
    assert caught.value.param == "temperature"


async def _gather(url: str, model: str) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

        async def ask(number: int) -> str:
            stream = await client.completions.create(
                model=model, prompt=f"{number} and", max_tokens=8, stream=True, temperature=0
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*(ask(number) for number in range(8)))


def test_asynchronous_client(url: str, model: str) -> None:
    assert all(asyncio.run(_gather(url, model)))
