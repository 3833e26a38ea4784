"""instructor: objects of pydantic classes, by tools and by JSON schema, whole and in parts."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field


class Weather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")  # else the model may add properties for ever
    city: str = Field(max_length=20)
    unit: Literal["C", "F"]


MODES = [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA]


@pytest.mark.parametrize("mode", MODES)
def test_object(url: str, model: str, mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=mode)
    found = client.chat.completions.create(
        model=model, response_model=Weather, max_tokens=200, temperature=0, max_retries=1,
        messages=[{"role": "user", "content": "The weather in Paris?"}],
    )  # fmt: skip
    assert isinstance(found, Weather)


@pytest.mark.parametrize("mode", MODES)
def test_parts_of_a_stream(url: str, model: str, mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=mode)
    parts = list(
        client.chat.completions.create_partial(
            model=model, response_model=Weather, max_tokens=200, temperature=0,
            messages=[{"role": "user", "content": "The weather in Paris?"}],
        )
    )  # fmt: skip
    assert len(parts) > 1
    assert parts[-1].unit in ("C", "F")
