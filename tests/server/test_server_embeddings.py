"""POST /v1/embeddings: shapes, encodings, what is refused; and the real `openai` client."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import openai
import pytest
from fake_engine import FakeEngine, fake_embedding
from running_server import RunningServer

PATH = "/v1/embeddings"


def numbers(tokens: int, pooling: str = "last") -> list[float]:
    found: list[float] = fake_embedding(tokens, pooling).tolist()
    return found


@pytest.mark.parametrize(
    ("given", "lengths"),
    [("Hi", [3]), (["Hi", "abc"], [3, 4]), ([72, 105], [2]), ([[72], [72, 105]], [1, 2])],
)
def test_each_input_has_its_embedding(
    given: Any, lengths: list[int], server: RunningServer, engine: FakeEngine
) -> None:
    reply = server.post(PATH, {"model": "fake-model", "input": given}).json()
    assert reply["object"] == "list"
    assert reply["data"] == [
        {"object": "embedding", "index": index, "embedding": numbers(length)}
        for index, length in enumerate(lengths)
    ]
    assert reply["model"] == "fake-model"
    assert reply["usage"]["prompt_tokens"] == reply["usage"]["total_tokens"] == sum(lengths)
    assert {handle.request.pooling for handle in engine.submitted} == {"last"}


def test_pooling_encoding_and_objective(server: RunningServer, engine: FakeEngine) -> None:
    body = {
        "input": "Hi", "pooling": "mean", "encoding_format": "base64", "slo": {"ttft_ms": 50},
        "priority": 3, "add_special_tokens": False, "return_metrics": True, "user": "me",
    }  # fmt: skip
    reply = server.post(PATH, body).json()
    raw = base64.b64decode(reply["data"][0]["embedding"])
    assert np.frombuffer(raw, "<f4").tolist() == numbers(2, "mean")
    assert reply["metrics"]["preemptions"] == 1
    (handle,) = engine.submitted
    assert (handle.slo.ttft, handle.request.priority) == (0.05, 3)


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("input", None, "input"),
        ("input", [], "input"),
        ("input", ["a", ""], "input[1]"),
        ("input", [1, 999], "input[1]"),
        ("dimensions", 8, "dimensions"),
        ("encoding_format", "int8", "encoding_format"),
        ("pooling", "max", "pooling"),
        ("truncate_prompt_tokens", 5, "truncate_prompt_tokens"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it(
    field: str, value: Any, param: str, server: RunningServer, engine: FakeEngine
) -> None:
    reply = server.post(PATH, {"input": "Hi", field: value})
    assert reply.status == 400
    assert reply.error["param"] == param
    assert not engine.submitted


def test_openai_client(client: openai.OpenAI) -> None:
    """It asks for base64 unless told otherwise, and decodes it."""
    reply = client.embeddings.create(model="fake-model", input=["Hi", "abc"])
    assert [one.embedding for one in reply.data] == [numbers(3), numbers(4)]
    assert reply.usage.total_tokens == 7
    plain = client.embeddings.create(model="fake-model", input="Hi", encoding_format="float")
    assert plain.data[0].embedding == numbers(3)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="Hi")
