"""What one request may cost: large, compressed, slow and crowded bodies are refused early."""

from __future__ import annotations

import gc
import gzip
import json
import socket
import threading
import time
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from fake_engine import WAIT_S, FakeEngine, Script
from running_server import RunningServer, StartServer

from flowprefill.errors import InvalidRequest, NotReady, shortened
from flowprefill.models import bounded_process
from flowprefill.models.chat_template import ChatTemplate
from flowprefill.server.http import json_text
from flowprefill.server.lanes import LONG_CHARS, THREADS, Lane

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
CALM_S = 5.0  # of computing, clients on the same GIL included


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "x-own", "gzip, identity"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_compressed_body_is_a_415(server: RunningServer, path: str, coding: str) -> None:
    body = gzip.compress(b" " * 100_000)
    reply = server.post(path, body, {"Content-Encoding": coding})
    assert (reply.status, reply.error["code"]) == (415, "unsupported_content_encoding")
    assert reply.error["param"] == "content-encoding"
    assert server.get("/health").status == 200


def test_identity_is_no_compression(server: RunningServer) -> None:
    body = json.dumps({"prompt": "Hi"}).encode()
    assert server.post(COMPLETIONS, body, {"Content-Encoding": "Identity"}).status == 200


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", COMPLETIONS, "POST"),
        ("PUT", "/tokenize", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
    ],
)
def test_405_says_what_is_allowed(
    server: RunningServer, method: str, path: str, allowed: str
) -> None:
    reply = server.request(method, path)
    assert (reply.status, reply.headers["Allow"]) == (405, allowed)
    assert reply.error["code"] == "method_not_allowed"


def test_body_limit_comes_from_the_models_length(
    start_server: StartServer, engine: FakeEngine
) -> None:
    engine.max_model_len = 200_000
    server = start_server(engine)
    limit = 200_000 * 32
    body = json.dumps({"prompt": "Hi"}).encode()
    assert server.post(COMPLETIONS, body.ljust(limit)).status == 200
    reply = server.post(COMPLETIONS, body.ljust(limit + 1))
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")
    engine.max_model_len = 512
    assert server.post(COMPLETIONS, body.ljust(4 << 20)).status == 200
    assert server.post(COMPLETIONS, body.ljust((4 << 20) + 1)).status == 413


def test_prompt_too_long_by_its_size_is_not_tokenised(
    server: RunningServer, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.max_model_len = 1000

    def encode(*_: Any) -> list[int]:
        raise AssertionError("tokenised")

    monkeypatch.setattr(engine.tokenizer, "encode", encode)
    for path, body in (
        (COMPLETIONS, {"prompt": "x" * 1001, "n": 2}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 1001}], "n": 2}),
        ("/tokenize", {"prompt": "x" * 1001}),
    ):
        reply = server.post(path, body)
        assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


def test_choices_of_one_prompt_are_tokenised_once(
    server: RunningServer, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, texts = engine.tokenizer.encode, []

    def counted(text: str, add_special_tokens: bool = True) -> list[int]:
        texts.append(text)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(engine.tokenizer, "encode", counted)
    assert server.post(COMPLETIONS, {"prompt": ["a", "b"], "n": 5}).status == 200
    assert texts == ["a", "b"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"stop_token_ids": [1] * 60_000, "n": 16}, "stop_token_ids"),
        (COMPLETIONS, {"stop": ["a"] * 40_000}, "stop"),
        (COMPLETIONS, {"metadata": {str(i): "" for i in range(30_000)}}, "metadata"),
        (COMPLETIONS, {"metadata": [[]] * 90_000}, "metadata"),
        (COMPLETIONS, {"logit_bias": {str(i): 1 for i in range(30_000)}}, "logit_bias"),
        (COMPLETIONS, {"prompt": ["a"] * 40_000, "n": 4}, "prompt"),
        (COMPLETIONS, {"prompt": [[1]] * 40_000}, "prompt"),
        (CHAT, {"messages": [{}] * 90_000}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * 90_000}]}, "messages[0].content"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_list_too_long_is_refused_by_its_length(
    server: RunningServer, engine: FakeEngine, path: str, fields: dict[str, Any], param: str
) -> None:
    base = {"prompt": "Hi"} if path == COMPLETIONS else {}
    reply = server.post(path, {**base, **fields})
    assert (reply.status, reply.error["param"]) == (400, param)
    assert "expected" in reply.error["message"]
    assert len(reply.error["message"]) < 300
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"metadata": [' + b"[]," * 300_000 + b"[]]}", "objects, lists and texts"),
        (b'{"metadata": [' + b"{}," * 300_000 + b"{}]}", "objects, lists and texts"),
        (b'{"stop": [' + b'"ab",' * 200_000 + b'"ab"]}', "objects, lists and texts"),
        (
            b"{" + b",".join(b'"%d":1' % i for i in range(150_000)) + b"}",
            "objects, lists and texts",
        ),
        (b'{"stop_token_ids": [' + b"1," * 400_000 + b"1]}", "numbers"),
        (b'{"prompt": [' + b",".join([b"9" * 4000] * 700) + b"]}", "a number is too long"),
    ],
    ids=["lists", "objects", "texts", "keys", "numbers", "digits"],
)
def test_crowded_body_is_refused_and_no_client_waits_for_it(
    server: RunningServer, engine: FakeEngine, raw: bytes, words: str
) -> None:
    engine.max_model_len = 4096
    done, statuses = threading.Event(), set()

    def watch() -> None:
        while not done.wait(0.005):
            statuses.add(server.get("/health").status)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    reply = server.post(COMPLETIONS, raw)
    done.set()
    watcher.join()
    computed_s = time.process_time() - start
    assert (reply.status, reply.error["param"]) == (400, "body")
    assert words in reply.error["message"]
    assert statuses == {200}
    assert computed_s < CALM_S, "so long a client may have waited"


def test_both_parsers_agree_on_good_bodies() -> None:
    few = json.dumps({"a": [1, -2.5e3, True, None, "x\u20ac"], "b": {"c": {}}})
    many = json.dumps([{"k": [i, "t"]} for i in range(json_text.FEW_PARTS)])
    ids = json.dumps({"prompt": list(range(json_text.FEW_VALUES + 1_000))})
    for text in (few, many, ids):
        assert json_text.parse_json(text.encode(), text) == json.loads(text)


def test_text_full_of_brackets_and_digits_is_one_text(server: RunningServer) -> None:
    prompt = json.dumps([{"id": "1" * 50, "of": [[]]}] * 20_000)
    assert server.post(COMPLETIONS, {"prompt": prompt}).status == 200


@pytest.mark.parametrize(
    "make",
    [
        lambda: [0] * 10**6,
        lambda: dict.fromkeys(range(10**6), 0),
        lambda: 10**5000,
        lambda: "x" * 10**7,
        lambda: [[["deep"] * 10**6] * 10**6],
    ],
    ids=["list", "object", "number", "text", "nested"],
)
def test_huge_value_is_shown_short_and_at_once(make: Callable[[], Any]) -> None:
    value = make()
    start = time.thread_time()
    message = InvalidRequest.field("f", value, "less").message
    assert len(message) < 150
    assert time.thread_time() - start < 0.1


@pytest.mark.parametrize("value", [5, -1.5, "half \ud800", [1, "a"], {"b": None, "a": [1]}, None])
def test_small_value_is_shown_whole(value: Any) -> None:
    assert shortened(value) == repr(value)


def test_slow_body_is_a_408(start_server: StartServer, engine: FakeEngine) -> None:
    server = start_server(engine, body_timeout_s=0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        connection.sendall(head)
        reply = b""
        while b'"code"' not in reply and (part := connection.recv(4096)):
            reply += part
    assert reply.startswith(b"HTTP/1.1 408")
    assert b'"code": "body_timeout"' in reply


def test_failed_engine_says_so(server: RunningServer, engine: FakeEngine) -> None:
    engine.has_failed = True
    engine.submit_error = NotReady("the engine has failed: KeyError('secret')")
    for path in ("/health", "/ready", "/health/ready"):
        reply = server.get(path)
        assert (reply.status, reply.json()["status"]) == (503, "failed")
    reply = server.post(COMPLETIONS, {"prompt": "x"}, {"x-request-id": "mine-18"})
    assert (reply.status, reply.error["code"]) == (503, "not_ready")
    assert "mine-18" in reply.error["message"]
    assert "secret" not in reply.error["message"]


class PanicException(BaseException):
    """As libraries in Rust raise it: no Exception."""


@pytest.mark.parametrize("prompt", ["short", "long " * 5000], ids=["loop", "thread"])
def test_panic_of_a_library_is_an_answered_500(
    server: RunningServer, engine: FakeEngine, prompt: str
) -> None:
    engine.submit_error = PanicException("index out of bounds")  # type: ignore[assignment]
    reply = server.post(COMPLETIONS, {"prompt": prompt})
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    engine.submit_error, engine.script = None, Script()
    assert server.post(COMPLETIONS, {"prompt": prompt}).status == 200


@pytest.mark.parametrize(
    "kwargs",
    [{"self": 1}, {"cls": [], "args": {}}, {"deep": [[[[]]]]}, {"n": 10**300}, {"name": "\ud800"}],
)
def test_template_variables_of_any_name_and_value_are_no_500(
    server: RunningServer, kwargs: dict[str, Any]
) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": kwargs}
    assert server.post(CHAT, body).status == 200


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = {"a": value} if level % 2 else [value]
    return value


TOO_DEEP = [json_text.MAX_DEPTH + 1, 450, 850]
DEEP_FIELDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "repeated": lambda n: {"metadata": {"a": nested(n - 2)}},
    "rendered": lambda n: {"documents": [{"a": nested(n - 3)}]},
    "copied": lambda n: {
        "tools": [{"type": "function", "name": "f", "parameters": {"x": nested(n - 4)}}],
        "tool_choice": "required",
    },
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", DEEP_FIELDS)
def test_what_is_nested_as_deep_as_allowed_is_answered_and_deeper_refused(
    server: RunningServer, field: str, stream: bool
) -> None:
    """What the parser takes, no copy and no encoder of it may fail on, not even in mid-stream."""
    for levels in (json_text.MAX_DEPTH, *TOO_DEEP):
        body = {"input": "x", "stream": stream, **DEEP_FIELDS[field](levels)}
        reply = server.post("/v1/responses", body)
        if levels == json_text.MAX_DEPTH:
            assert reply.status == 200, reply.body
            assert b"internal_error" not in reply.body
        else:
            assert (reply.status, reply.error["param"]) == (400, "body"), levels
            assert "nested too deeply, expected at most 128" in reply.error["message"]


@pytest.mark.parametrize("levels", TOO_DEEP)
def test_arguments_of_a_call_nested_too_deeply_are_a_400(
    server: RunningServer, levels: int
) -> None:
    call = {"function": {"name": "f", "arguments": json.dumps(nested(levels))}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "x"}]
    reply = server.post(CHAT, {"messages": messages})
    assert reply.status == 400
    assert reply.error["param"] == "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    "field", ["temperature", "seed", "max_tokens", "n", "priority", "logprobs"]
)
@pytest.mark.parametrize("digits", [400, 5000])
def test_number_of_hundreds_of_digits_is_a_400(
    server: RunningServer, field: str, digits: int
) -> None:
    raw = b'{"prompt": "a", "%s": %s}' % (field.encode(), b"9" * digits)
    reply = server.post(COMPLETIONS, raw)
    assert (reply.status, reply.error["param"]) == (400, field if digits <= 400 else "body")


def test_chat_template_without_end_holds_no_client_up(
    server: RunningServer, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_process, "WALL_LIMIT_S", WAIT_S)  # the one on computing counts
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template, has_begun, may_end = ChatTemplate(loops), threading.Event(), threading.Event()

    def render(*arguments: Any, **options: Any) -> str:
        """Take until others were answered, however slow they are here."""
        has_begun.set()
        try:
            return template.render(*arguments, **options)
        finally:
            assert may_end.wait(WAIT_S), "no client was answered meanwhile"

    engine.render_chat = render  # type: ignore[method-assign]
    replies: list[Any] = []

    def chat() -> None:
        replies.append(server.post(CHAT, {"messages": [{"role": "user", "content": "Hi"}]}))

    client = threading.Thread(target=chat)
    client.start()
    assert has_begun.wait(WAIT_S)
    for _ in range(50):
        assert server.get("/health").status == 200
    assert client.is_alive()
    may_end.set()
    client.join()
    assert (replies[0].status, replies[0].error["param"]) == (400, "messages")
    assert "computed longer than" in replies[0].error["message"]


def test_bodies_together_take_bounded_memory(engine: FakeEngine, start_server: StartServer) -> None:
    server = start_server(engine, max_bodies_mib=1.0, body_timeout_s=WAIT_S)
    held = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S)
    half = b" " * (700 * 1024)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Length: {2 * len(half)}\r\n\r\n"
    held.sendall(head.encode() + half)
    memory = server.server.context.body_memory
    deadline = time.monotonic() + WAIT_S
    while memory.used < len(half):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    refused = server.post("/v1/completions", b" " * (500 * 1024))
    assert (refused.status, refused.error["code"]) == (503, "too_many_bodies")
    assert refused.headers["Retry-After"]
    assert server.post("/v1/completions", {"prompt": "Hi"}).status == 200
    held.close()
    while memory.used:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert server.post("/v1/completions", {"prompt": "Hi" + " " * (500 * 1024)}).status == 200


def bodies_in(waiting: Any) -> int:
    """Return how many bodies of the test below the work in a pool's queue still holds."""
    todo, found = [item.fn for item in gc.get_referents(waiting)[0] if item is not None], 0
    while todo:
        one = todo.pop()
        if type(one) is types.FunctionType:
            todo += [cell.cell_contents for cell in one.__closure__ or ()]
        elif type(one) is partial:
            todo += [one.func, *one.args]
        elif type(one) is list:
            todo += one
        found += type(one) is bytes and one.startswith(b'{"marked')
    return found


def test_bodies_of_clients_that_have_left_take_no_memory(
    engine: FakeEngine, server: RunningServer
) -> None:
    """All threads are busy: what still waits for one is let go of, not kept until its turn."""
    context, busy = server.server.context, []
    engine.submit_gate = threading.Event()
    for number in range(THREADS[Lane.HUGE]):
        busy.append(server.raw_socket(COMPLETIONS, {"prompt": "x" * LONG_CHARS}))
        wait_for(lambda number=number: context.generating == number + 1)
    waiting = context.lanes._pools[Lane.HUGE]._work_queue
    wait_for(lambda: waiting.qsize() == 0)
    left = [server.raw_socket(COMPLETIONS, {"marked": "x" * 2**20}) for _ in range(5)]
    wait_for(lambda: waiting.qsize() == len(left))
    assert bodies_in(waiting) == len(left)
    for connection in left:
        connection.close()
    wait_for(lambda: bodies_in(waiting) == 0)
    wait_for(lambda: context.body_memory.used < 2**20)
    assert waiting.qsize() == len(left), "their turn had not come"
    engine.submit_gate.set()
    for connection in busy:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.close()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/responses", "/v1/embeddings", "echo"])
def test_body_is_counted_until_its_prompt_is_tokenised(
    engine: FakeEngine, start_server: StartServer, path: str
) -> None:
    """And no longer, but for replies that repeat what was in it."""
    server = start_server(engine, max_bodies_mib=2.0, body_timeout_s=WAIT_S)
    memory, text = server.server.context.body_memory, "x" * 600 * 1024
    body: dict[str, Any] = {
        CHAT: {"messages": [{"role": "user", "content": text}]},
        "/v1/responses": {"input": text},
        "/v1/embeddings": {"input": text},
        "echo": {"prompt": text, "echo": True},
    }.get(path, {"prompt": text})
    is_kept = path in ("/v1/responses", "echo")
    path = COMPLETIONS if path == "echo" else path
    engine.submit_gate, engine.script = threading.Event(), Script(gate=threading.Event())
    clients = [server.raw_socket(path, body) for _ in range(3)]
    wait_for(lambda: memory.used > 3 * len(text))
    refused = server.post(COMPLETIONS, {"prompt": text})
    assert (refused.status, refused.error["code"]) == (503, "too_many_bodies")
    engine.submit_gate.set()
    engine.wait_submitted(3)
    wait_for(lambda: memory.used > 3 * len(text) if is_kept else memory.used == 0)
    assert engine.script.gate is not None
    engine.script.gate.set()
    for client in clients:
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.close()
    wait_for(lambda: memory.used == 0)


SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
HUGE = "x" * LONG_CHARS
SLOW: dict[str, dict[str, Any]] = {
    "huge texts": {"prompt": HUGE},
    "huge chats": {"messages": [{"role": "user", "content": HUGE}]},
    "new grammars": {"prompt": "Hi", "response_format": SCHEMA},
    "new grammars of huge chats": {
        "messages": [{"role": "user", "content": HUGE}], "response_format": SCHEMA
    },
}  # fmt: skip


@pytest.mark.parametrize("slow", SLOW)
def test_slow_work_of_one_kind_holds_up_no_other(
    server: RunningServer, engine: FakeEngine, slow: str
) -> None:
    """However many such requests wait."""
    known = {"prompt": "Hi", "guided_choice": ["a", "b"]}
    assert server.post(COMPLETIONS, known).status == 200
    may_end, submit = threading.Event(), engine.submit
    engine.compile_gate = may_end

    def submit_slowly(request: Any, slo: Any = None) -> Any:
        assert len(request.prompt) < LONG_CHARS or may_end.wait(WAIT_S)
        return submit(request, slo)

    engine.submit = submit_slowly  # type: ignore[method-assign]
    path = CHAT if "messages" in SLOW[slow] else COMPLETIONS
    clients = [server.raw_socket(path, SLOW[slow]) for _ in range(12)]
    wait_for(lambda: server.server.context.generating == len(clients))
    hi = {"messages": [{"role": "user", "content": "Hi"}]}
    assert server.post(CHAT, hi).status == 200
    assert server.post(COMPLETIONS, {"prompt": "x" * 50_000}).status == 200
    assert server.post(COMPLETIONS, known).status == 200
    assert server.post("/tokenize", {"prompt": "Hi"}).status == 200
    assert server.get("/debug/requests").status == 200
    assert not may_end.is_set()
    may_end.set()
    for client in clients:
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.close()


def test_grammar_of_a_client_that_has_left_is_not_submitted(
    server: RunningServer, engine: FakeEngine
) -> None:
    engine.compile_gate = threading.Event()
    client = server.raw_socket(COMPLETIONS, {"prompt": "Hi", "response_format": SCHEMA})
    context = server.server.context
    wait_for(lambda: context.generating == 1)
    client.close()
    wait_for(lambda: context.generating == 0)
    engine.compile_gate.set()
    wait_for(lambda: len(engine.grammars) == 1)
    assert server.post(COMPLETIONS, {"prompt": "Hi"}).status == 200
    assert len(engine.submitted) == 1
