"""outlines over its OpenAI model: text, streams, and objects by JSON schema."""

from __future__ import annotations

from typing import Any, Literal

import openai
import outlines
import pytest
from pydantic import BaseModel, ConfigDict, Field


class Weather(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else the model may add properties for ever
    city: str = Field(max_length=20)
    unit: Literal["C", "F"]


@pytest.fixture(scope="module")
def generator(url: str, model: str) -> Any:
    return outlines.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), model)


def test_text_whole_and_streamed_agree(generator: Any) -> None:
    whole = generator("Say hi.", max_tokens=8, temperature=0)
    assert "".join(generator.stream("Say hi.", max_tokens=8, temperature=0)) == whole != ""


def test_object(generator: Any) -> None:
    text = generator("The weather in Paris?", Weather, max_tokens=200, temperature=0)
    assert isinstance(Weather.model_validate_json(text), Weather)
