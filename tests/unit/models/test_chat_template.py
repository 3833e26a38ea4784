"""Chat templates: rendering, the sandbox, and errors that name the field of the messages."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from flowprefill.errors import InvalidRequest
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


def test_content_may_be_absent_beside_tool_calls() -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "1"}]}
    assert ChatTemplate("{{ messages[0].content is none }}").render([call]) == "True"


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
