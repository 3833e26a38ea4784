"""llama-index's OpenAILike: completions, chat, streams, and objects of pydantic classes."""

from __future__ import annotations

from typing import Literal

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict, Field


class Weather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")  # else the model may add properties for ever
    city: str = Field(max_length=20)
    unit: Literal["C", "F"]


def client(url: str, model: str, **settings: bool) -> OpenAILike:
    return OpenAILike(
        api_base=f"{url}/v1", api_key="none", model=model, max_tokens=200, temperature=0.0,
        context_window=2048, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("is_chat_model", [False, True])
def test_complete_whole_and_streamed_agree(url: str, model: str, is_chat_model: bool) -> None:
    llm = client(url, model, is_chat_model=is_chat_model)
    whole = llm.complete("One two three", max_tokens=8)
    parts = list(llm.stream_complete("One two three", max_tokens=8))
    assert parts[-1].text == whole.text != ""


def test_chat(url: str, model: str) -> None:
    reply = client(url, model, is_chat_model=True).chat([ChatMessage(role="user", content="Hi")])
    assert reply.message.content


@pytest.mark.parametrize(
    "settings",
    [{"should_use_structured_outputs": True}, {"is_function_calling_model": True}],
    ids=["json_schema", "tools"],
)
def test_object(url: str, model: str, settings: dict[str, bool]) -> None:
    llm = client(url, model, is_chat_model=True, **settings)
    prompt = PromptTemplate("What is the weather in {city}?")
    options = {"tool_choice": "required"} if "is_function_calling_model" in settings else {}
    found = llm.structured_predict(Weather, prompt, llm_kwargs=options, city="Paris")
    assert isinstance(found, Weather)
