"""langchain-openai: chat, streams, tools, with_structured_output, and an agent's round."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

QUESTION = "What is the weather in Paris?"


class Weather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")  # else the model may add properties for ever
    city: str = Field(max_length=20)
    unit: Literal["C", "F"]


@tool
def add(a: Literal[1, 2], b: Literal[1, 2]) -> int:
    """Add two small numbers."""
    return a + b


@pytest.fixture(scope="module")
def chat(url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=200
    )


def test_invoke_stream_and_batch_agree(chat: ChatOpenAI) -> None:
    short = chat.model_copy(update={"max_tokens": 12})
    whole = short.invoke(QUESTION)
    assert whole.usage_metadata is not None
    assert "".join(str(part.content) for part in short.stream(QUESTION)) == whole.content != ""
    assert [one.content for one in short.batch([QUESTION] * 2)] == [whole.content] * 2


def test_completions(url: str, model: str) -> None:
    text = OpenAI(base_url=f"{url}/v1", api_key="none", model=model, max_tokens=5)
    assert text.invoke("One two three")


def test_tools_and_their_result(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([add], tool_choice="any")
    asked = HumanMessage("Add 1 and 2.")
    called = bound.invoke([asked])
    (call,) = called.tool_calls[:1]
    result = add.invoke(call)
    assert isinstance(result, ToolMessage)
    chat.bind_tools([add]).invoke([asked, called, result])


# Not json_mode: an object of any shape may be one that a small model never ends.
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_with_structured_output(chat: ChatOpenAI, method: Any) -> None:
    bound = chat.with_structured_output(Weather, method=method)
    assert isinstance(bound.invoke(QUESTION), Weather)


def test_responses_api(url: str, model: str) -> None:
    chat = ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model=model, use_responses_api=True, max_tokens=16
    )
    assert chat.invoke("Say hi.").text
