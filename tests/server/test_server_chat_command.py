"""`flowprefill chat` against a server with a fake engine, and with an engine in its process."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_engine import FakeEngine, Script
from rich.console import Console
from running_server import RunningServer, StartServer

from flowprefill import cli
from flowprefill.chat.command import Conversation
from flowprefill.chat.talks import EngineTalk, Message, ServerTalk, TalkSettings
from flowprefill.config import EngineConfig
from flowprefill.errors import FlowPrefillError, InvalidRequest, RequestFailed

SETTINGS = TalkSettings(max_tokens=20, temperature=0.0)
HELLO: list[Message] = [{"role": "user", "content": "Hello"}]


class Screen:
    """A conversation that writes into a text."""

    def __init__(self, engine: FakeEngine, system: str = "") -> None:
        self.written = io.StringIO()
        console = Console(file=self.written)
        self.chat = Conversation(EngineTalk(engine), SETTINGS, system, console)

    def take(self, line: str) -> str:
        """Give one line; returns what appears."""
        before = len(self.written.getvalue())
        self.chat.take(line)
        return self.written.getvalue()[before:]


def test_server_streams_an_answer_with_its_objective(
    server: RunningServer, engine: FakeEngine
) -> None:
    talk = ServerTalk(server.url)
    assert talk.model == "fake-model"
    parts = list(talk.answer(HELLO, TalkSettings(20, 0.0, ttft_ms=250)))
    assert "".join(parts) == "Hello world"
    assert len(parts) > 1
    assert engine.submitted[0].slo.ttft == 0.25


def test_server_refusal_is_told_in_its_words(server: RunningServer) -> None:
    with pytest.raises(InvalidRequest, match="max_tokens: got 0"):
        list(ServerTalk(server.url).answer(HELLO, TalkSettings(0, 0.0)))
    with pytest.raises(FlowPrefillError, match="refused"):
        ServerTalk("http://127.0.0.1:9")
    with pytest.raises(InvalidRequest, match="--url: got 'localhost:8000'"):
        ServerTalk("localhost:8000")


def test_server_stream_that_fails_is_told(start_server: StartServer) -> None:
    engine = FakeEngine()
    engine.script = Script(error=RequestFailed("device lost"), error_at=3)
    with pytest.raises(FlowPrefillError, match="the request failed"):
        list(ServerTalk(start_server(engine).url).answer(HELLO, SETTINGS))


EVENT = b'data: {"choices": [{"delta": {"content": "Hel"}}]}\n\n'
LAST = b'data: {"choices": [{"delta": {"content": "lo"}, "finish_reason": "stop"}]}\n\n'


@contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """A server that says this to whatever comes, and closes; gives its URL."""

    def answer() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(reply)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(65_536)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            thread.join()


@pytest.mark.parametrize(
    "events", [EVENT + LAST, EVENT + LAST.replace(b'"stop"', b"null") + b"data: [DONE]\n\n"]
)
@pytest.mark.parametrize("written", [(b"", b""), (b"data: ", b"data:"), (b"\n", b"\r\n")])
def test_streams_of_other_servers_are_read(events: bytes, written: tuple[bytes, bytes]) -> None:
    with answering(b"HTTP/1.0 200 OK\r\n\r\n" + events.replace(*written)) as url:
        assert list(ServerTalk(url, model="m").answer(HELLO, SETTINGS)) == ["Hel", "lo"]


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (CHUNKED % (len(EVENT), EVENT), "broke off before the answer's end"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + EVENT, "broke off before the answer's end"),
        (b'HTTP/1.0 200 OK\r\n\r\n{"choices": []}', "broke off before the answer's end"),
        (b'HTTP/1.1 400 No\r\nContent-Length: 99\r\n\r\n{"error": ', "completions: status 400"),
        (b"HTTP/1.0 500 No\r\n\r\n" + b"[" * 100_000, "completions: status 500"),
    ],
)
def test_server_that_dies_in_its_answer_is_told(reply: bytes, words: str) -> None:
    with answering(reply) as url, pytest.raises(FlowPrefillError, match=words):
        list(ServerTalk(url, model="m").answer(HELLO, SETTINGS))


def test_server_key_is_sent(start_server: StartServer) -> None:
    tenants = {"team": {"key": "secret-key-of-the-team"}}
    server = start_server(FakeEngine(), tenants=tenants)
    talk = ServerTalk(server.url, "secret-key-of-the-team")
    assert "".join(talk.answer(HELLO, SETTINGS)) == "Hello world"
    with pytest.raises(InvalidRequest):
        list(ServerTalk(server.url, model="fake-model").answer(HELLO, SETTINGS))


def test_answer_that_is_closed_is_cancelled(engine: FakeEngine) -> None:
    answer = EngineTalk(engine).answer(HELLO, SETTINGS)
    next(answer)
    answer.close()
    assert engine.submitted[0].cancels == 1


def test_conversation_keeps_what_was_said(engine: FakeEngine) -> None:
    screen = Screen(engine, system="Be brief.")
    shown = screen.take("Hello")
    assert shown.startswith("Hello world\nfirst token after ")
    assert [m["role"] for m in screen.chat.messages] == ["system", "user", "assistant"]
    screen.take("/clear")
    assert [m["role"] for m in screen.chat.messages] == ["system"]
    screen.take("/system")
    assert screen.chat.messages == []


def test_slo_command_sets_the_objective(engine: FakeEngine) -> None:
    screen = Screen(engine)
    assert "within 250 ms" in screen.take("/slo 250")
    shown = screen.take("Hello")
    assert engine.submitted[-1].slo.ttft == 0.25
    assert shown.strip().endswith((", within 250 ms", ", over 250 ms"))
    assert "no objective" in screen.take("/slo off")
    screen.take("Hello")
    assert engine.submitted[-1].slo.ttft is None


@pytest.mark.parametrize("value", ["", "soon", "-3", "0", "nan", "1e99"])
def test_slo_command_refuses_what_is_no_objective(engine: FakeEngine, value: str) -> None:
    assert "expected milliseconds" in Screen(engine).take(f"/slo {value}")


def test_answer_is_shown_as_it_is_but_cannot_steer_the_terminal(engine: FakeEngine) -> None:
    engine.script = Script(text="\x1b[2J[b]:no:\x07 \u00e4\n")
    assert Screen(engine).take("Hello").startswith("[2J[b]:no: \u00e4\n")


def test_commands_are_listed_and_guessed(engine: FakeEngine) -> None:
    screen = Screen(engine)
    assert "/slo 250" in screen.take("/help")
    assert "did you mean /clear?" in screen.take("/claer")
    assert screen.take("") == ""
    assert engine.submitted == []


def test_failed_answer_leaves_the_conversation(engine: FakeEngine) -> None:
    screen = Screen(engine)
    engine.script = Script(error=RequestFailed("device lost"))
    assert "device lost" in screen.take("Hello")
    assert screen.chat.messages == []


def test_ctrl_c_ends_the_answer_only(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(engine)

    class Interrupted(EngineTalk):
        def answer(self, *args: Any) -> Any:
            yield "Hel"
            raise KeyboardInterrupt

    screen.chat = Conversation(Interrupted(engine), SETTINGS, "", screen.chat._console)
    assert screen.take("Hello").startswith("Hel [stopped]\n")
    assert screen.chat.messages[-1] == {"role": "assistant", "content": "Hel"}


def test_command_talks_with_lines_from_a_pipe(
    server: RunningServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/quit\nnever read\n"))
    assert cli.main(["chat", "--url", server.url, "--slo", "250"]) == 0
    assert capsys.readouterr().out.startswith("Hello world\nfirst token after ")


def test_command_loads_a_model_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    loaded = threading.Event()

    def load(model: str, config: EngineConfig) -> FakeEngine:
        assert (model, config.threads) == ("some-model", 2)
        loaded.set()
        return engine

    monkeypatch.setattr(cli, "load_engine", load)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    assert cli.main(["chat", "some-model", "--threads", "2"]) == 0
    assert loaded.is_set()
    assert "Hello world" in capsys.readouterr().out
    assert not engine.is_ready


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (("--slo", "-1"), 2, "slo: got -1"),
        (("--max-tokens", "0"), 2, "max_tokens: got 0, expected an integer >= 1"),
        (("--temperature", "nan"), 2, "temperature: got nan"),
        (("--url", "nowhere"), 2, "--url: got 'nowhere'"),
        (("--url", ""), 2, "--url: got ''"),
        (("--url", "http://[::1"), 2, "--url: got 'http://[::1'"),
        (("--url", "http://127.0.0.1:9", "--api-key", "a\nb"), 2, "--api-key"),
        (("--url", "http://127.0.0.1:9"), 1, "http://127.0.0.1:9: Connection refused\n"),
    ],
)
def test_bad_chat_flags_are_one_line(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], status: int, words: str
) -> None:
    assert cli.main(["chat", *argv]) == status
    assert words in capsys.readouterr().err
