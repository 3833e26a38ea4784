"""Chat templates: rendering, the sandbox, and errors that name the field of the messages."""

from __future__ import annotations

import datetime as dt
import errno
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from flowprefill.errors import InvalidRequest, ProcessNotStarted
from flowprefill.models import bounded_process, template_process
from flowprefill.models.chat_template import ChatTemplate

CHATML = """{% for message in messages %}
    {% if loop.index0 == 99 %}{% break %}{% endif %}
{{ '<' + message['role'] + '>' + message['content'] }}
{% endfor %}
{% if add_generation_prompt %}
<assistant>
{%- endif %}"""
USER = {"role": "user", "content": "hi"}


def test_blocks_are_trimmed_and_prompt_is_added_on_request() -> None:
    template = ChatTemplate(CHATML)
    assert template.render([USER]) == "<user>hi\n<assistant>"
    assert template.render([USER], add_generation_prompt=False) == "<user>hi\n"


def test_typed_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts}
    assert ChatTemplate("{{ messages[0].content }}").render([message]) == "ab"
    assert message["content"] is parts


def test_templates_see_tools_special_tokens_and_variables() -> None:
    text = "{{ bos_token }}{{ tools | tojson }}{{ thinking }}{{ unknown is defined }}"
    template = ChatTemplate(text, {"bos_token": "<s>"})
    tools = [{"name": "é<b>", "n": 1}]
    rendered = template.render([USER], tools=tools, thinking="on")
    assert rendered == '<s>[{"name": "é<b>", "n": 1}]onFalse'
    assert ChatTemplate("{{ tools is none }}").render([USER]) == "True"
    assert ChatTemplate("{{ messages | tojson(indent=1) }}").render([USER]).count("\n") > 3


def test_generation_blocks_and_today_are_supported() -> None:
    text = "{% generation %}x{% endgeneration %}{{ strftime_now('%Y') }}"
    year = ChatTemplate(text).render([USER]).removeprefix("x")
    assert abs(int(year) - dt.datetime.now().year) <= 1


def test_content_may_be_absent_with_tool_calls() -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "1"}]}
    assert ChatTemplate("{{ messages[0].content is defined }}").render([call]) == "False"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ({"role": "user"}, "messages"),
        (["hi"], "messages[0]"),
        ([USER, {"content": "x"}], "messages[1].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "\udc00"}], "messages[0].content"),
    ],
)
def test_bad_messages_name_the_field(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(CHATML).render(messages)
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: got ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "template is broken: line 1"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ nothing.here }}", "nothing"),
    ],
)
def test_errors_of_the_template_are_invalid_requests(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        ChatTemplate(text).render([USER])
    assert caught.value.param == "messages"


def test_missing_template_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        ChatTemplate(None).render([USER])


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ range(10000000) | list }}",
    ],
)
def test_sandbox_refuses_to_leave_the_template(text: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(text).render([USER])


def test_message_text_is_never_a_template() -> None:
    message = {"role": "user", "content": "{{ 1 + 1 }}"}
    assert ChatTemplate("{{ messages[0].content }}").render([message]) == "{{ 1 + 1 }}"


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def render_and_tick(text: str) -> tuple[str, int]:
    """Render in this thread while another counts; returns the error and the count."""
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.005):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        with pytest.raises(InvalidRequest) as caught:
            ChatTemplate(text).render([USER])
    finally:
        done.set()
        ticker.join()
    assert caught.value.param == "messages"
    return caught.value.message, ticks


@pytest.mark.parametrize(
    "text",
    [
        LOOPS,
        "{% set n = 9 ** (9 ** 9) %}{{ n }}",  # worked out while it is compiled
        "{% set n = messages | length + 8 %}{{ n ** (n ** n) }}",  # one operation in C
    ],
    ids=["loops", "constant", "power"],
)
def test_template_that_computes_too_long_is_stopped_and_blocks_no_loop(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where others have the cores, two seconds of computing may take minutes.
    monkeypatch.setattr(bounded_process, "WALL_LIMIT_S", 250.0)
    message, ticks = render_and_tick(text)
    assert "computed longer than 2 s" in message
    assert ticks > 5
    assert ChatTemplate(CHATML).render([USER]) == "<user>hi\n<assistant>"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{{ messages[0].content * 10000000000 }}", "MemoryError"),
        (
            "{% for a in range(9999) %}{{ '%999d' % a }}{% endfor %}",
            "writes more than 1048624 char",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "template is broken: RecursionError"),
        ("{% if a %}" * 150 + "{% endif %}" * 150, "template is broken: (Syntax|Indentation)Error"),
        ("{{ messages[0].content.zfill(99999999999) }}", "MemoryError"),
    ],
    ids=["memory", "output", "recursion", "parentheses", "blocks", "fill"],
)
def test_limits_of_a_template_are_invalid_requests(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        ChatTemplate(text).render([USER])
    assert len(caught.value.message) < 500


def test_variables_may_have_any_name() -> None:
    template = ChatTemplate("{{ tools is none }}{{ messages[0].content }}{{ context }}")
    assert template.render([USER], self=1, cls=2, context=3, text=4) == "Truehi3"


def test_variables_are_what_json_can_carry() -> None:
    template = ChatTemplate("{{ a.b }}{{ c | join }}{{ d is none }}{{ e }}")
    values = {"a": MappingProxyType({"b": 1}), "c": (2, 3), "d": None, "e": 0.5}
    assert template.render([USER], **values) == "123True0.5"
    with pytest.raises(InvalidRequest, match="got object, expected text, numbers"):
        template.render([USER], a=object())
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="not what JSON can carry"):
        template.render([USER], a=deep)


def test_process_that_died_while_idle_is_replaced() -> None:
    template = ChatTemplate(CHATML)
    template.render([USER])
    for process in template_process.PROCESSES._idle:
        os.kill(process._process.pid, signal.SIGKILL)
        process._process.wait()
    assert template.render([USER]).startswith("<user>")


@pytest.mark.parametrize("start", ["import no_such_module", "import time; time.sleep(1000)"])
def test_a_process_that_does_not_start_is_no_fault_of_the_messages(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(start)
    monkeypatch.setattr(template_process.template_worker, "__file__", str(worker))
    if "sleep" in start:
        monkeypatch.setattr(bounded_process, "WALL_LIMIT_S", 0.5)
    template_process.PROCESSES.close()
    with pytest.raises(ProcessNotStarted) as caught:
        ChatTemplate(CHATML).render([USER])
    assert (caught.value.status, caught.value.param) == (500, None)
    assert "messages" not in caught.value.message
    said = "is not up after 0.5 s" if "sleep" in start else "No module named 'no_such_module'"
    assert said in caplog.text
    monkeypatch.undo()
    assert ChatTemplate("{{ messages[0].content }}").render([USER]) == "hi"


def test_a_machine_without_another_process_is_no_fault_of_the_messages(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    template_process.PROCESSES.close()
    monkeypatch.setattr(subprocess, "Popen", fails)
    template_process.PROCESSES.warm()  # a server that serves all else starts
    with pytest.raises(ProcessNotStarted):
        ChatTemplate(CHATML).render([USER])
    assert "Resource temporarily unavailable" in caplog.text


def test_modules_of_the_users_folder_named_as_pythons_own_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python has imported its own before the folder of a script, or of -m, comes into the path."""
    for name in ("types", "enum", "json", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not the one that was meant')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    template_process.PROCESSES.close()  # those that idle were started without it
    assert ChatTemplate("{{ messages[0].content }}").render([USER]) == "hi"


def test_forked_child_has_its_own_processes() -> None:
    template = ChatTemplate(CHATML)
    template.render([USER])
    child = os.fork()
    if child == 0:
        try:
            is_right = template.render([USER]) == "<user>hi\n<assistant>"
            template_process.PROCESSES.close()
        finally:
            os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert template.render([USER]) == "<user>hi\n<assistant>"


def test_many_threads_share_a_few_processes() -> None:
    template, results = ChatTemplate(CHATML), []

    def work(number: int) -> None:
        for _ in range(10):
            message = {"role": "user", "content": f"{number} " * 1000}
            results.append(template.render([message]) == f"<user>{message['content']}\n<assistant>")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80
    assert len(template_process.PROCESSES._idle) <= template_process.MOST_PROCESSES


class SlowProcess:
    """Answers what is long when it may, anything else at once."""

    is_alive = True

    def __init__(self) -> None:
        self.may_end, self.asked = threading.Event(), []

    def ask(self, request: bytes) -> bytes:
        self.asked.append(request)
        is_long = len(request) > template_process.LONG_BYTES
        assert not is_long or self.may_end.wait(30)
        return b'{"text": "done"}'


def test_long_chats_leave_a_process_to_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowProcess()
    monkeypatch.setattr(template_process, "start_process", lambda: slow)
    processes = template_process.TemplateProcesses()
    long = {"text": "x" * template_process.LONG_BYTES}
    threads = [threading.Thread(target=processes.render, args=("a", long, 9)) for _ in range(6)]
    for thread in threads:
        thread.start()
    while len(slow.asked) < template_process.MOST_FOR_LONG:
        time.sleep(0.001)
    template = "{# a template's own length does not count #}" * 1000
    assert processes.render(template[:8000], {"text": "x"}, 9) == "done"
    slow.may_end.set()
    for thread in threads:
        thread.join(30)
    assert len(slow.asked) == 7


def test_process_ends_with_its_last_connection() -> None:
    process = template_process.start_process()
    process._socket.close()
    deadline = time.monotonic() + 100
    while process.is_alive:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.end()
