"""The real `openai` client: sync and async, whole and streamed, error classes, retries."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from fake_engine import FakeEngine, Script
from running_server import RunningServer, StartServer

from flowprefill.errors import (
    DeadlinePassed,
    NotReady,
    Overloaded,
    PromptTooLong,
    RequestCancelled,
    RequestFailed,
)

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


def test_completion(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="fake-model", prompt="Hi")
    assert reply.choices[0].text == "Hello world"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == 15


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="fake-model", messages=MESSAGES, logprobs=True, top_logprobs=2
    )
    assert reply.choices[0].message.content == "Hello world"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.content is not None
    assert reply.choices[0].logprobs.content[0].token == "H"
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_completion_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="fake-model", prompt="Hi", stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "Hello world"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert [c.usage for c in chunks[:-1]] == [None] * 12


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="fake-model", messages=MESSAGES, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == "H"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hello world"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_async_client(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        reply = await client.completions.create(model="fake-model", prompt="Hi")
        assert reply.choices[0].text == "Hello world"
        stream = await client.chat.completions.create(
            model="fake-model", messages=MESSAGES, stream=True
        )
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(texts) == "Hello world"


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("fake-model", "model", "flowprefill")
    assert model.created == 1_700_000_000
    assert client.models.retrieve("fake-model").id == "fake-model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_model_names_with_slashes_and_aliases(
    start_server: StartServer, engine: FakeEngine
) -> None:
    server = start_server(engine, served_model_names=("org/name", "short"))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["org/name", "short"]
        assert client.models.retrieve("org/name").id == "org/name"
        assert client.completions.create(model="short", prompt="a").model == "short"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="fake-model", prompt="a")


def test_own_fields_travel_in_extra_body(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(
        model="fake-model",
        prompt="Hi",
        extra_body={"slo": {"ttft_ms": 250}, "ignore_eos": True, "top_k": 5, "min_tokens": 2},
        extra_headers={"x-slo-tpot-ms": "100"},
    )
    handle = engine.submitted[0]
    assert (handle.slo.ttft, handle.slo.tpot) == (0.25, 0.1)
    assert handle.request.sampling.ignore_eos
    assert handle.request.sampling.top_k == 5
    assert handle.request.sampling.min_tokens == 2


def test_bad_value_is_a_bad_request_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake-model", prompt="Hi", temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.code == "invalid_value"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (PromptTooLong("prompt: 9 tokens, at most 8", param="prompt"), openai.BadRequestError, 400),
        (Overloaded("too much", retry_after_s=2.2), openai.RateLimitError, 429),
        (NotReady("loading"), openai.InternalServerError, 503),
        (RuntimeError("a bug"), openai.InternalServerError, 500),
    ],
)
def test_submit_error_keeps_its_class(
    client: openai.OpenAI,
    engine: FakeEngine,
    error: Exception,
    kind: type[openai.APIStatusError],
    status: int,
    stream: bool,
) -> None:
    engine.submit_error = error
    with pytest.raises(kind) as caught:
        client.completions.create(model="fake-model", prompt="Hi", stream=stream)
    assert caught.value.status_code == status


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (RequestFailed("qkv, layer 3, request r"), 500, "the log has it under request id"),
        (DeadlinePassed("TTFT of 250 ms cannot be met"), 504, "250 ms cannot be met"),
        (RequestCancelled("cancelled"), 499, "cancelled"),
    ],
)
def test_error_before_the_first_token_keeps_its_status(
    client: openai.OpenAI,
    engine: FakeEngine,
    error: Exception,
    status: int,
    shown: str,
    stream: bool,
) -> None:
    engine.script = Script(error=error)
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="fake-model", messages=MESSAGES, stream=stream)
    assert caught.value.status_code == status
    assert shown in caught.value.message
    assert "qkv" not in caught.value.message


def test_error_in_mid_stream_is_raised_after_the_tokens(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.script = Script(error=RequestFailed("qkv, layer 3, request r"), error_at=3)
    chunks = iter(client.completions.create(model="fake-model", prompt="Hi", stream=True))
    texts = [next(chunks).choices[0].text for _ in range(3)]
    with pytest.raises(openai.APIError, match="the log has it under") as caught:
        next(chunks)
    assert texts == ["H", "e", "l"]
    assert caught.value.code == "run_failed"


def test_passed_deadline_is_not_retried(server: RunningServer, engine: FakeEngine) -> None:
    engine.script = Script(error=DeadlinePassed("too late"))
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.completions.create(model="fake-model", prompt="Hi")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(engine.submitted) == 1


def test_overload_is_retried_after_the_stated_time(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.submit_error = Overloaded("too much waits", retry_after_s=0.0504)
    reply = server.post("/v1/completions", {"prompt": "Hi"})
    assert reply.status == 429
    assert (reply.headers["Retry-After"], reply.headers["retry-after-ms"]) == ("1", "51")
    assert reply.error == {
        "message": "too much waits",
        "type": "rate_limit_error",
        "param": None,
        "code": "overloaded",
    }
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=1) as client:
        original = engine.submit

        def once(*arguments: Any) -> Any:
            try:
                return original(*arguments)
            finally:
                engine.submit_error = None

        engine.submit = once  # type: ignore[method-assign]
        assert client.completions.create(model="fake-model", prompt="Hi").choices[0].text


def test_echo_with_logprobs(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="fake-model", prompt=[[72, 105], [104]], echo=True, logprobs=1, max_tokens=1, seed=1
    )
    logprobs = [choice.logprobs for choice in reply.choices]
    assert [one.tokens for one in logprobs if one] == [["H", "i", "H"], ["h", "H"]]
    assert logprobs[0] is not None
    assert logprobs[0].token_logprobs == [None, -1.0, -0.5]
    assert logprobs[0].text_offset == [0, 1, 2]
