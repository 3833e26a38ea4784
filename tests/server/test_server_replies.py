"""Whole and streamed replies over a real socket: shapes, counts, golden transcripts."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
from fake_engine import EOS, FakeEngine, FakeHandle, Script
from running_server import RunningServer, StartServer

from flowprefill.request import SLO, Request

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
SNOWMAN = "\N{SNOWMAN}"


def complete(server: RunningServer, **fields: Any) -> dict[str, Any]:
    reply = server.post("/v1/completions", {"model": "fake-model", "prompt": "Hi", **fields})
    assert reply.status == 200, reply.body
    return dict(reply.json())


def stream(server: RunningServer, path: str, **fields: Any) -> list[Any]:
    reply = server.post(path, {"stream": True, **fields})
    assert reply.status == 200, reply.body
    return reply.events()


def golden(raw: bytes) -> str:
    """A transcript with what differs from run to run replaced."""
    text = re.sub(r'"id":"(cmpl|chatcmpl)-[0-9a-f]{24}"', r'"id":"\1-ID"', raw.decode())
    return re.sub(r'"created":\d+', '"created":0', text)


def test_completion_reply_has_every_openai_field(server: RunningServer) -> None:
    reply = complete(server)
    assert reply["id"].startswith("cmpl-")
    assert reply["object"] == "text_completion"
    assert reply["model"] == "fake-model"
    assert isinstance(reply["created"], int)
    assert re.fullmatch(r"fp_[0-9a-f]{12}", reply["system_fingerprint"])
    assert reply["choices"] == [
        {"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}
    ]
    # "Hi" and BOS; eleven letters and EOS.
    assert reply["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 12,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert "metrics" not in reply


def test_completion_max_tokens_default_is_sixteen(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.script = Script(text="x" * 100)
    reply = complete(server)
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 16


def test_chat_max_tokens_default_is_unlimited(server: RunningServer, engine: FakeEngine) -> None:
    engine.script = Script(text="x" * 100)
    reply = server.post("/v1/chat/completions", CHAT).json()
    assert reply["usage"]["completion_tokens"] == 101
    assert engine.submitted[0].request.sampling.max_tokens is None


def test_chat_reply_has_message_and_template_was_used(
    server: RunningServer, engine: FakeEngine
) -> None:
    reply = server.post("/v1/chat/completions", CHAT).json()
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert engine.submitted[0].request.prompt == "<user>Hi<assistant>"
    assert not engine.submitted[0].request.add_special_tokens


def test_chat_typed_parts_developer_and_names_reach_the_template(
    server: RunningServer, engine: FakeEngine
) -> None:
    messages = [
        {"role": "developer", "content": "Be brief", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert server.post("/v1/chat/completions", {"messages": messages}).status == 200
    parts = messages[1]["content"]
    assert engine.submitted[0].request.prompt == f"<system>Be brief<user>{parts}<assistant>"


@pytest.mark.parametrize(
    ("prompt", "submitted"),
    [
        ("Hi", ["Hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_completion_prompt_forms(
    server: RunningServer, engine: FakeEngine, prompt: Any, submitted: list[Any]
) -> None:
    reply = complete(server, prompt=prompt)
    assert [handle.request.prompt for handle in engine.submitted] == submitted
    assert [choice["index"] for choice in reply["choices"]] == list(range(len(submitted)))


def test_completion_several_choices_count_each_prompt_once(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.script = Script(cached_tokens=1)
    reply = complete(server, prompt=["a", "bcd"], n=2, seed=7)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [h.request.prompt for h in engine.submitted] == [[256, *b"a"]] * 2 + [[256, *b"bcd"]] * 2
    assert [h.request.sampling.seed for h in engine.submitted] == [7, 8, 7, 8]
    assert len({h.request_id for h in engine.submitted}) == 4
    assert reply["usage"]["prompt_tokens"] == 2 + 4
    assert reply["usage"]["completion_tokens"] == 4 * 12
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_completion_echo_repeats_text_and_token_prompts(server: RunningServer) -> None:
    assert complete(server, echo=True)["choices"][0]["text"] == "HiHello world"
    reply = complete(server, prompt=[72, 105], echo=True)
    assert reply["choices"][0]["text"] == "HiHello world"
    events = stream(server, "/v1/completions", prompt="Hi", echo=True)
    assert events[0]["choices"][0]["text"] == "HiH"
    assert "".join(e["choices"][0]["text"] for e in events) == "HiHello world"


def test_completion_logprobs_are_parallel_lists(server: RunningServer, engine: FakeEngine) -> None:
    engine.script = Script(text="ab")
    logprobs = complete(server, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "<eos>"]
    assert logprobs["token_logprobs"] == [-0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] == {"a": -0.5, "b": -1.5}
    assert logprobs["text_offset"] == [0, 1, 2]
    assert complete(server, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"][1] == {"b": -0.5}


def test_chat_logprobs_have_bytes_and_alternatives(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.script = Script(text="a" + SNOWMAN)
    body = {**CHAT, "logprobs": True, "top_logprobs": 1}
    content = server.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
    }
    snowman = [byte for entry in content[1:4] for byte in entry["bytes"]]
    assert bytes(snowman).decode() == SNOWMAN
    assert [entry["token"] for entry in content[4:]] == ["<eos>"]


def test_return_token_ids_whole_and_streamed(server: RunningServer, engine: FakeEngine) -> None:
    engine.script = Script(text="a" + SNOWMAN)
    ids = [97, *SNOWMAN.encode(), EOS]
    assert complete(server, return_token_ids=True)["choices"][0]["token_ids"] == ids
    events = stream(server, "/v1/completions", prompt="Hi", return_token_ids=True)
    assert [i for e in events for i in e["choices"][0]["token_ids"]] == ids


def test_metrics_object_is_opt_in_by_field_or_header(server: RunningServer) -> None:
    metrics = complete(server, return_metrics=True)["metrics"]
    assert metrics == {
        "queue_time_ms": 1.0,
        "preprocess_time_ms": 0.25,
        "waiting_time_ms": 0.75,
        "prefill_run_ms": 4.0,
        "suspended_ms": 2.0,
        "preemptions": 1,
        "time_to_first_token_ms": 8.0,
        "predicted_ttft_ms": 5.0,
        "generation_time_ms": 12.0,
        "mean_itl_ms": 1.0,
        "tokens_per_second": 916.667,
        "total_time_ms": 20.0,
        "slo_met": None,
    }
    headers = {"x-return-metrics": "1"}
    by_header = server.post("/v1/completions", {"prompt": "Hi"}, headers).json()
    assert by_header["metrics"] == metrics
    several = complete(server, return_metrics=True, n=2)
    assert len(several["choice_metrics"]) == 2


def test_metrics_object_in_a_stream_comes_last(server: RunningServer) -> None:
    options = {"include_usage": True}
    events = stream(
        server, "/v1/completions", prompt="Hi", return_metrics=True, stream_options=options
    )
    assert events[-1]["choices"] == []
    assert events[-1]["metrics"]["preemptions"] == 1
    assert events[-1]["usage"]["completion_tokens"] == 12
    alone = stream(server, "/v1/completions", prompt="Hi", return_metrics=True)
    assert alone[-1]["choices"] == []
    assert "usage" not in alone[-1]


def test_stream_completion_golden_transcript(server: RunningServer, engine: FakeEngine) -> None:
    engine.script = Script(text="Hi")
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    reply = server.post("/v1/completions", body)
    head = (
        'data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"fake-model",'
        f'"system_fingerprint":"{server.server.context.fingerprint}","choices":['
    )
    part = '{"index":0,"text":"%s","logprobs":null,"finish_reason":%s}],"usage":null}\n\n'
    assert golden(reply.body) == (
        head + part % ("H", "null")
        + head + part % ("i", "null")
        + head + part % ("", '"stop"')
        + head + '],"usage":{"prompt_tokens":2,"completion_tokens":3,"total_tokens":5,'
        '"prompt_tokens_details":{"cached_tokens":0}}}\n\n'
        "data: [DONE]\n\n"
    )  # fmt: skip


def test_stream_chat_golden_transcript(server: RunningServer, engine: FakeEngine) -> None:
    engine.script = Script(text="Hi", finish="length")
    reply = server.post("/v1/chat/completions", {**CHAT, "stream": True})
    head = (
        'data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":0,'
        '"model":"fake-model",'
        f'"system_fingerprint":"{server.server.context.fingerprint}","choices":[{{"index":0,"delta":'
    )
    assert golden(reply.body) == (
        head + '{"role":"assistant","content":"H"},"logprobs":null,"finish_reason":null}]}\n\n'
        + head + '{"content":"i"},"logprobs":null,"finish_reason":"length"}]}\n\n'
        "data: [DONE]\n\n"
    )  # fmt: skip


def test_stream_headers_forbid_buffering(server: RunningServer) -> None:
    reply = server.post("/v1/completions", {"prompt": "x", "stream": True})
    assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["X-Accel-Buffering"] == "no"
    assert reply.headers["Cache-Control"] == "no-cache"
    assert reply.headers["Content-Encoding"] is None


def test_stream_first_event_has_text_though_the_first_tokens_have_none(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.script = Script(text=SNOWMAN + "a")
    events = stream(server, "/v1/chat/completions", **CHAT)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas == [{"role": "assistant", "content": SNOWMAN}, {"content": "a"}, {}]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_stream_held_tokens_count_in_usage_and_keep_their_logprobs(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.script = Script(text=SNOWMAN)
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(server, "/v1/completions", prompt="x", logprobs=0, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in events] == [3, 4, 4]
    assert len(events[0]["choices"][0]["logprobs"]["tokens"]) == 3
    assert events[1]["choices"][0]["logprobs"]["text_offset"] == [1]


def test_stream_without_any_text_still_has_role_and_finish_reason(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.script = Script(text="")
    (event,) = stream(server, "/v1/chat/completions", **CHAT)
    assert event["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert event["choices"][0]["finish_reason"] == "stop"


def test_stream_several_choices_are_whole_each(server: RunningServer) -> None:
    events = stream(server, "/v1/chat/completions", **CHAT, n=3)
    texts = {0: "", 1: "", 2: ""}
    for event in events:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert set(texts.values()) == {"Hello world"}
    finished = [e["choices"][0]["finish_reason"] for e in events]
    assert finished.count("stop") == 3


def test_service_tier_is_reported_where_it_chose_the_class(start_server: Any) -> None:
    from flowprefill.config import EngineConfig

    engine = FakeEngine(EngineConfig(classes={"batch": {"ttft_ms": 60_000}}))
    server = start_server(engine, service_tiers={"flex": "batch"})
    assert complete(server, service_tier="flex")["service_tier"] == "flex"
    assert "service_tier" not in complete(server, service_tier="auto")
    assert engine.submitted[0].slo.service_class == "batch"


def test_long_whole_reply_equals_its_short_ones(server: RunningServer, engine: FakeEngine) -> None:
    engine.script = Script(text="caf\u00e9 " * 100, finish="length")
    long = complete(server, prompt="x", n=8, logprobs=1, max_tokens=10_000, return_token_ids=True)
    short = complete(server, prompt="x", n=1, logprobs=1, max_tokens=10_000, return_token_ids=True)
    assert long["usage"]["completion_tokens"] == 8 * short["usage"]["completion_tokens"] > 2_000
    assert [{**choice, "index": 0} for choice in long["choices"]] == short["choices"] * 8


# The fake engine's prompt "Hi" is BOS, H, i; each has logprob -1, the token before it -0.5.
ECHOED = {
    "tokens": ["<bos>", "H", "i", "a"],
    "token_logprobs": [None, -1.0, -1.0, -0.5],
    "top_logprobs": [
        None, {"G": -0.5, "H": -1.0}, {"h": -0.5, "i": -1.0}, {"a": -0.5},
    ],
    "text_offset": [0, 0, 1, 2],
}  # fmt: skip


def test_echo_with_logprobs_has_those_of_the_prompt(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.script = Script(text="ab")
    (choice,) = complete(server, echo=True, logprobs=1, max_tokens=1)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hia", "length")
    assert choice["logprobs"] == ECHOED
    assert engine.submitted[0].request.sampling.prompt_logprobs == 1
    (choice,) = complete(server, echo=True, logprobs=0, max_tokens=0)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    assert choice["logprobs"]["top_logprobs"] == [None, {"H": -1.0}, {"i": -1.0}]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]


def test_echo_with_logprobs_in_a_stream_comes_with_the_first_text(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.script = Script(text="ab")
    fields = {"prompt": "Hi", "echo": True, "logprobs": 1}
    first, second, _ = stream(server, "/v1/completions", **fields, max_tokens=3)
    assert first["choices"][0]["text"] == "Hia"
    assert first["choices"][0]["logprobs"] == ECHOED
    assert second["choices"][0]["logprobs"]["text_offset"] == [3]
    (only,) = stream(server, "/v1/completions", **fields, max_tokens=0)
    assert (only["choices"][0]["text"], only["choices"][0]["finish_reason"]) == ("Hi", "length")
    assert only["choices"][0]["logprobs"]["tokens"] == ["<bos>", "H", "i"]


def test_echo_of_token_lists_has_offsets_in_the_text(
    server: RunningServer, engine: FakeEngine
) -> None:
    """Tokens that are parts of a character: the text has it once, where its first byte is."""
    reply = complete(server, prompt=[[*"aé".encode(), 256], [104, 105]], echo=True, logprobs=1, n=2)
    first, second, third, _ = (choice["logprobs"] for choice in reply["choices"])
    assert first["text_offset"][:5] == [0, 1, 2, 2, 2]
    assert first["tokens"][:5] == ["a", "\ufffd", "\ufffd", "<bos>", "H"]
    assert second == first
    assert third["tokens"][:3] == ["h", "i", "H"]
    scored = [handle.request.sampling.prompt_logprobs for handle in engine.submitted]
    assert scored == [1, None, 1, None]


class ScoringLast(FakeEngine):
    """The first choice, which scores the prompt, is the last to have a token; until then none."""

    def submit(self, request: Request, slo: SLO | None = None) -> FakeHandle:
        gate = threading.Event() if request.sampling.prompt_logprobs is not None else None
        self.script = Script(text="ab", gate=gate)
        handle = super().submit(request, slo)
        if gate is not None:
            threading.Thread(target=self.score_last, args=(handle, gate), daemon=True).start()
        return handle

    def score_last(self, handle: FakeHandle, gate: threading.Event) -> None:
        scores, handle.prompt_logprobs = handle.prompt_logprobs, None
        self.wait_ended(2)
        handle.prompt_logprobs = scores
        gate.set()


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_prompt_of_a_stream_with_several_choices_is_scored_once(
    start_server: StartServer, max_tokens: int
) -> None:
    engine = ScoringLast()
    events = stream(
        start_server(engine), "/v1/completions", prompt="Hi", echo=True, logprobs=1, n=3,
        max_tokens=max_tokens,
    )  # fmt: skip
    assert [one.request.sampling.prompt_logprobs for one in engine.submitted] == [1, None, None]
    assert len(events) == 3 * max(max_tokens, 1)
    for index in range(3):
        choices = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(one["text"] for one in choices) == "Hi" + "ab"[:max_tokens]
        assert choices[0]["logprobs"]["tokens"] == ["<bos>", "H", "i", "a"][: 3 + max_tokens // 2]
        assert choices[0]["logprobs"]["token_logprobs"][:3] == [None, -1.0, -1.0]
        assert choices[-1]["finish_reason"] == "length"


def test_offsets_are_where_tokens_begin_though_their_text_is_held(
    server: RunningServer, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where "ab" may be the start of a stop string: its text comes with the third token."""
    emit = FakeHandle._emit
    held = {ord("a"): "", ord("b"): "", ord("c"): "abc"}

    def late(handle: FakeHandle, token_id: int, text: str, finish: Any) -> None:
        emit(handle, token_id, held.get(token_id, text), finish)

    monkeypatch.setattr(FakeHandle, "_emit", late)
    engine.script = Script(text="abcé!")
    (choice,) = complete(server, logprobs=0)["choices"]
    assert choice["text"] == "abcé!"
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 4, 5]
    events = stream(server, "/v1/completions", prompt="Hi", logprobs=0)
    parts = [event["choices"][0]["logprobs"]["text_offset"] for event in events]
    assert [at for part in parts for at in part] == choice["logprobs"]["text_offset"]


def test_prompt_logprobs_are_as_vllm_shows_them(server: RunningServer) -> None:
    entry = {
        "72": {"logprob": -1.0, "rank": 2, "decoded_token": "H"},
        "71": {"logprob": -0.5, "rank": 1, "decoded_token": "G"},
    }
    (choice,) = complete(server, prompt_logprobs=2, max_tokens=0)["choices"]
    assert len(choice["prompt_logprobs"]) == 3
    assert choice["prompt_logprobs"][:2] == [None, entry]
    assert choice["logprobs"] is None
    messages = [{"role": "user", "content": "Hi"}]
    chat = server.post(
        "/v1/chat/completions", {"messages": messages, "prompt_logprobs": 0, "max_tokens": 1}
    ).json()
    assert chat["prompt_logprobs"][0] is None
    choices = complete(server, prompt_logprobs=1, n=2, seed=1)["choices"]
    assert choices[0]["prompt_logprobs"] == choices[1]["prompt_logprobs"]
    assert len(choices[1]["prompt_logprobs"]) == 3
    assert [len(one) for one in chat["prompt_logprobs"][1:]] == [1] * (
        chat["usage"]["prompt_tokens"] - 1
    )
