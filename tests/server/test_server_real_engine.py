"""The server over the real engine and the default model: replies agree, nothing leaks."""

from __future__ import annotations

import contextlib
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openai
import pytest
from fake_engine import WAIT_S
from running_server import RunningServer

from flowprefill import Engine, EngineConfig, Request, SamplingParams, cli
from flowprefill.server.observe import live_feed
from flowprefill.server.options import ServerOptions

pytestmark = pytest.mark.slow
PROMPT = "The capital of France is"
LONG_IDS = [(7 * i) % 20_000 + 100 for i in range(6000)]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    config = EngineConfig(calibrate=False, kv_cache_gib=0.25, classes={"chat": {"ttft_ms": 60_000}})
    with Engine(config=config) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[RunningServer]:
    server = RunningServer(engine, ServerOptions())
    yield server
    server.end()


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


def test_whole_streamed_and_direct_text_agree(client: openai.OpenAI, engine: Engine) -> None:
    direct = engine.submit(Request(PROMPT, SamplingParams(max_tokens=8, temperature=0.0))).result(
        60
    )
    whole = client.completions.create(
        model=engine.model_id, prompt=PROMPT, max_tokens=8, temperature=0
    )
    chunks = client.completions.create(
        model=engine.model_id, prompt=PROMPT, max_tokens=8, temperature=0, stream=True
    )
    assert whole.choices[0].text == direct.text
    assert "".join(chunk.choices[0].text for chunk in chunks) == direct.text
    assert whole.choices[0].finish_reason == direct.finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == direct.prompt_tokens


def test_clients_that_never_read_have_no_part_in_the_steps_of_one_that_does(
    server: RunningServer, engine: Engine
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    alone = server.post("/v1/completions", body).json()["choices"]
    with contextlib.ExitStack() as stack:
        stalled = {"prompt": "x", "stream": True, "max_tokens": 2000, "ignore_eos": True}
        for _ in range(5):
            stack.enter_context(server.raw_socket("/v1/completions", stalled, receive_bytes=4096))
        wait_for(lambda: engine.stats().held == 5 and not engine._core._runs)
        decided = engine.decisions()[-1]["time_s"]
        reply = server.post("/v1/completions", body).json()
        assert reply["choices"] == alone
        steps = [
            one["requests"]
            for one in engine.decisions()
            if one["kind"] == "decode" and one["time_s"] > decided
        ]
        assert len(steps) == 7
        assert all(len(step) == 1 and step[0].startswith(reply["id"]) for step in steps)
        assert (engine.stats().held, engine.stats().running) == (5, 0)
    wait_for(lambda: engine.stats().kv_blocks_used == 0)


def test_client_beside_never_reading_ones_of_another_address_is_in_every_step() -> None:
    """While their systems still take tokens, so that none of them is held."""
    config = EngineConfig(calibrate=False, kv_cache_gib=0.1, max_running=4)
    stalled = {"prompt": "x", "stream": True, "max_tokens": 300, "ignore_eos": True}
    body = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True}
    with Engine(config=config) as engine, contextlib.ExitStack() as stack:
        server = RunningServer(engine, ServerOptions())
        stack.callback(server.end)
        for _ in range(20):
            stack.enter_context(server.raw_socket("/v1/completions", stalled, address="127.0.0.2"))
        wait_for(lambda: engine.stats().running == 20)
        name = server.post("/v1/completions", body).json()["id"]
        assert engine.stats().held == 0
        steps = [one["requests"] for one in engine.decisions() if one["kind"] == "decode"]
    own = [number for number, step in enumerate(steps) if name in step]
    assert len(own) == 11
    assert own == list(range(own[0], own[0] + 11))
    assert max(len(steps[number]) for number in own) > 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_texts_are_let_go_of_once_they_are_tokens(
    server: RunningServer, engine: Engine, path: str
) -> None:
    """A reply may take hours, and thousands may wait: they keep token ids, not what was sent."""
    text = "one two " * 500
    body: dict[str, Any] = {"max_tokens": 500, "ignore_eos": True, "stream": True}
    if path == "/v1/completions":
        body["prompt"] = text
    else:
        function = {"name": "f", "description": text}
        body["messages"] = [{"role": "user", "content": text, "unseen": text}]
        body["tools"] = [{"type": "function", "function": function}]
        body["chat_template_kwargs"] = {"unused": text}
    gc.freeze()  # what was there before is not looked at
    client = server.raw_socket(path, body, receive_bytes=4096)
    assert client.recv(100).startswith(b"HTTP/1.1 200")
    owned = [(owner, one) for owner in gc.get_objects() for one in gc.get_referents(owner)]
    gc.unfreeze()
    # A dictionary of texts alone is none of the objects that the collector lists.
    owned += [(one, text) for _, one in owned if type(one) is dict for text in one.values()]
    kept = [
        type(owner) for owner, one in owned if type(one) is str and one is not text and text in one
    ]
    assert kept == []
    client.close()
    wait_for(lambda: engine.stats().kv_blocks_used == 0)


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}


def test_required_tool_is_called_whole_and_streamed(client: openai.OpenAI, engine: Engine) -> None:
    def ask(*, stream: bool) -> Any:
        return client.chat.completions.create(
            model=engine.model_id,
            messages=[{"role": "user", "content": "What is the weather in Paris?"}],
            tools=[{"type": "function", "function": {"name": "weather", "parameters": CITY}}],
            tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=60,
            stream=stream,
        )  # fmt: skip

    (choice,) = ask(stream=False).choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "weather")
    assert json.loads(call.function.arguments)["unit"] in ("C", "F")
    deltas = [chunk.choices[0].delta for chunk in ask(stream=True)]
    parts = [call.function.arguments for delta in deltas for call in delta.tool_calls or ()]
    assert "".join(part or "" for part in parts) == call.function.arguments


def test_schema_and_choice_bind_the_text(client: openai.OpenAI, engine: Engine) -> None:
    reply = client.chat.completions.create(
        model=engine.model_id,
        messages=[{"role": "user", "content": "Describe Paris."}],
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
        max_tokens=60, n=2, seed=3,
    )  # fmt: skip
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        assert set(json.loads(choice.message.content or "")) == {"city", "unit"}
    colour = client.completions.create(
        model=engine.model_id, prompt="The sky is", extra_body={"guided_choice": ["red", "blue"]}
    )
    assert colour.choices[0].text in ("red", "blue")
    with pytest.raises(openai.BadRequestError, match="look-around") as caught:
        client.completions.create(
            model=engine.model_id, prompt="a", extra_body={"guided_regex": "(?=a)b"}
        )
    assert caught.value.param == "guided_regex"


def test_chat_with_class_logprobs_and_timings(client: openai.OpenAI, engine: Engine) -> None:
    reply = client.chat.completions.create(
        model=engine.model_id,
        messages=[{"role": "user", "content": "Say hi"}],
        max_completion_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"slo": {"class": "chat"}, "return_metrics": True},
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == reply.choices[0].message.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in logprobs.content)
    metrics = reply.model_dump()["metrics"]
    assert metrics["slo_met"] is True
    assert 0 < metrics["time_to_first_token_ms"] <= metrics["total_time_ms"]


def test_prompt_beyond_the_model_is_a_400_with_the_numbers(
    client: openai.OpenAI, engine: Engine
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(
            model=engine.model_id, prompt=[5] * (engine.max_model_len + 1), max_tokens=1
        )
    assert caught.value.code == "context_length_exceeded"
    assert str(engine.max_model_len) in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_client_gone_in_mid_prefill_frees_every_block(
    server: RunningServer, engine: Engine, stream: bool
) -> None:
    body = {"prompt": LONG_IDS, "max_tokens": 50, "stream": stream}
    connection = server.raw_socket("/v1/completions", body)
    wait_for(lambda: engine.stats().running == 1)
    for path in ("/health", "/ready", "/metrics"):
        assert server.get(path).status == 200
    connection.close()
    wait_for(lambda: engine.stats().running == 0 and engine.stats().kv_blocks_used == 0)
    assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1}).status == 200
    assert engine.stats().waiting == engine.stats().suspended == 0


def test_ready_tells_the_device_and_why(server: RunningServer, engine: Engine) -> None:
    about = server.get("/ready").json()
    assert about["status"] == "ready"
    assert about["device"] == engine.describe()["device"]
    assert about["device"] == "cpu" or about["device"].startswith("cuda:")
    assert len(about["reason"]) > 10
    assert about["dtype"] in ("bf16", "f32")


def test_urgent_request_passes_a_running_long_one(server: RunningServer, engine: Engine) -> None:
    preemptions, segments = engine.stats().preemptions, engine.stats().segments
    order: list[str] = []

    def ask(name: str, prompt: list[int], **slo: dict[str, int]) -> None:
        body = {"prompt": prompt, "max_tokens": 1, **slo}
        assert server.post("/v1/completions", body).status == 200
        order.append(name)

    long = threading.Thread(target=ask, args=("long", LONG_IDS))
    long.start()
    # Before its first segment it would give way without being preempted.
    wait_for(lambda: engine.stats().segments > segments)
    # An objective that any machine meets, against none.
    ask("short", LONG_IDS[:16], slo={"ttft_ms": 60_000})
    long.join(WAIT_S)
    assert order == ["short", "long"]
    assert engine.stats().preemptions == preemptions + 1
    assert "flowprefill:preemptions_total" in server.get("/metrics").body.decode()


def test_slow_tokenising_counts_as_preprocessing_not_as_waiting(
    server: RunningServer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = engine.tokenizer.encode

    def slowly(text: str, add_special_tokens: bool = True) -> list[int]:
        time.sleep(0.2)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(engine.tokenizer, "encode", slowly)
    body = {"prompt": PROMPT, "max_tokens": 1, "return_metrics": True}
    metrics = server.post("/v1/completions", body).json()["metrics"]
    assert metrics["preprocess_time_ms"] >= 200
    assert metrics["waiting_time_ms"] == pytest.approx(
        metrics["queue_time_ms"] - metrics["preprocess_time_ms"], abs=0.01
    )
    assert metrics["waiting_time_ms"] < metrics["queue_time_ms"] - 199


def test_explain_tells_what_happened_to_a_request(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}).json()
    assert cli.main(["explain", reply["id"], "--url", server.url]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{reply['id']}: ")
    for part in ("It arrived", "Its prefill started", "Its first token was made", "It ended: "):
        assert part in told
    assert cli.main(["explain", "--url", server.url]) == 0
    assert reply["id"] in capsys.readouterr().out
    assert cli.main(["explain", "no-such-id", "--url", server.url]) == 2
    assert "none of the last requests" in capsys.readouterr().err


def test_live_shows_the_prefill_of_a_prompt(server: RunningServer, engine: Engine) -> None:
    segments = engine.stats().segments
    assert len(engine.timeline(segments)) == 0
    body = {"prompt": LONG_IDS[:700], "max_tokens": 3, "slo": {"class": "chat"}}
    for _ in range(10):  # again if it was looked for too late: only the last ten seconds are shown
        assert server.post("/v1/completions", body).status == 200
        assert len(engine.timeline(segments)) == engine.stats().segments - segments > 0
        time.sleep(live_feed.FRESH_S)
        state = server.get("/live").json()
        if any(bar["prompt_tokens"] == 700 for bar in state["bars"]):
            break
    now_s, bars = state["now_s"], state["bars"]
    assert any(bar["prompt_tokens"] == 700 for bar in bars)
    assert bars[-1]["name"] == "decode"
    assert all(bar["start_s"] <= bar["end_s"] <= now_s + 1e-3 for bar in bars)
    assert all(now_s - live_feed.WINDOW_S - 1e-3 <= bar["end_s"] for bar in bars)
    (chat,) = (one for one in state["classes"] if one["name"] == "chat")
    assert chat["slo_requests"] == chat["slo_met"] >= 1  # other tests' requests are in it too
    assert chat["slo_ttft_ms"] == 60_000.0


def test_scores_of_contexts_and_continuations(client: openai.OpenAI, engine: Engine) -> None:
    """As lm_eval asks: token lists, echo, logprobs 1; it reads tokens [context:-1] of the lists."""
    contexts = ["The capital of France is", "Two and two make"]
    asked = [(context, answer) for context in contexts for answer in (" Paris", " four", " blue")]
    encoded = [(engine.tokenizer.encode(c, False), engine.tokenizer.encode(a)) for c, a in asked]
    reply = client.completions.create(
        model=engine.model_id, prompt=[c + a for c, a in encoded], echo=True, logprobs=1,
        max_tokens=1, temperature=0, seed=1234,
    )  # fmt: skip
    scores = []
    for choice, (context, answer) in zip(reply.choices, encoded, strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.top_logprobs is not None
        assert logprobs.text_offset is not None
        assert len(logprobs.tokens) == len(context + answer) + 1
        own = slice(len(context), -1)
        assert "".join(logprobs.tokens[own]) == engine.tokenizer.decode(answer)
        begin, end = logprobs.text_offset[len(context)], logprobs.text_offset[-1]
        assert choice.text[begin:end] == engine.tokenizer.decode(answer)
        total = sum(logprobs.token_logprobs[own])  # type: ignore[arg-type]
        params = SamplingParams(max_tokens=0, prompt_logprobs=1)
        direct = engine.submit(Request(context + answer, params)).result(60).prompt_logprobs
        assert total == pytest.approx(direct.logprobs[len(context) :].sum(), abs=0.05)
        pairs = zip(logprobs.token_logprobs[own], logprobs.top_logprobs[own], strict=True)
        is_greedy = all(one == max(top.values()) for one, top in pairs)
        assert is_greedy == bool((direct.ranks[len(context) :] == 1).all())
        scores.append(total)
    assert max(scores[:3]) == scores[0]
    assert max(scores[3:]) == scores[4]


def test_embeddings_tell_what_is_alike(client: openai.OpenAI, engine: Engine) -> None:
    texts = ["The cat sleeps on the sofa.", "A cat is sleeping on a couch.", "Sell all shares now!"]
    for pooling in ("last", "mean"):
        reply = client.embeddings.create(
            model=engine.model_id, input=texts, extra_body={"pooling": pooling}
        )
        vectors = np.array([one.embedding for one in reply.data])
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
        alike = vectors @ vectors.T
        assert alike[0, 1] > alike[0, 2]
        assert alike[0, 1] > alike[1, 2]
    ids = engine.tokenizer.encode(texts[0])
    direct = engine.embed(ids, pooling="mean").result(60).embedding
    assert vectors[0] == pytest.approx(direct, abs=1e-2)
