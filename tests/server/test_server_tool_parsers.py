"""Tool calls and reasoning in generated text: every format, in pieces, and what is no call."""

from __future__ import annotations

import json

import pytest
from fake_engine import ByteTokenizer

from flowprefill.server.openai.message import MessageParser, MessagePart, PlainText
from flowprefill.server.openai.reasoning import Thinking, reasoning_parser_of
from flowprefill.server.openai.tool_parsers import FORMATS, ToolCalls, call_format_of
from flowprefill.server.openai.tools import Tools, call_grammar

NAMES = ("weather", "add", "now")
ARGS = '{"city": "Zürich \\"x\\" }", "days": [1, {"a": "]"}]}'


def parse(parser: MessageParser, text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    """Push a text in pieces; returns content and (name, arguments) of the calls."""
    whole = MessagePart()
    for start in range(0, len(text), size):
        whole.add(parser.push(text[start : start + size]))
    whole.add(parser.finish())
    assert [call.index for call in whole.calls] == list(range(len(whole.calls)))
    assert len({call.id for call in whole.calls}) == len(whole.calls)
    assert parser.has_calls == bool(whole.calls)
    return whole.content, [(call.name or "", call.arguments) for call in whole.calls]


def call(form: str, arguments: str = ARGS, name: str = "weather") -> str:
    return f'{{"name": "{name}", "{FORMATS[form].argument_key}": {arguments}}}'


ONE, TWO = [("weather", ARGS)], [("weather", ARGS), ("add", "{}")]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        ("hermes", f"<tool_call>\n{call('hermes')}\n</tool_call>", "", ONE),
        ("hermes", f"Let me see.\n\n<tool_call>{call('hermes')}</tool_call>\n", "Let me see.", ONE),
        (
            "hermes",
            (f"<tool_call>\n{call('hermes')}\n</tool_call>\n<tool_call>\n"
            f"{call('hermes', '{}', 'add')}\n</tool_call>"),
            "\n",
            TWO,
        ),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "",
         [("add", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "",
         [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "",
         [("add", '{"a": 1}')]),
        ("hermes", "a < b <tool_calls> <tool_c", "a < b <tool_calls> <tool_c", []),
        ("hermes", "no call  ", "no call  ", []),
        ("hermes", '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}', []),
        ("llama3", call("llama3"), "", ONE),
        ("llama3", f"<|python_tag|>{call('llama3')}", "", ONE),
        ("llama3", f"{call('llama3')}; {call('llama3', '{}', 'add')}", "", TWO),
        ("llama3", "It is {hot}", "It is {hot}", []),
        ("llama3", f"It is {call('llama3')}", f"It is {call('llama3')}", []),
        ("mistral", f"[TOOL_CALLS] [{call('mistral')}]", "", ONE),
        ("mistral", f"[TOOL_CALLS][{call('mistral')}, {call('mistral', '{}', 'add')}]", "", TWO),
        ("mistral", f"[TOOL_CALLS]weather[ARGS]{ARGS}[TOOL_CALLS]add[ARGS]{{}}", "", TWO),
        ("mistral", f"[TOOL_CALLS]weather{ARGS}", "", ONE),
        ("mistral", f"[TOOL_CALLS]weather{ARGS}[TOOL_CALLS]ad", "[TOOL_CALLS]ad", ONE),
        ("mistral", "see [1] and [TOOL]", "see [1] and [TOOL]", []),
        ("json", call("json"), "", ONE),
        ("json", f"  [{call('json')},\n {call('json', '{}', 'add')}]", "", TWO),
        ("json", f'{{"function": "weather", "parameters": {ARGS}}}', "", ONE),
        ("json", "plain text", "plain text", []),
        ("json", f'{call("json")} {{"nam', '{"nam', ONE),
    ],
)  # fmt: skip
def test_calls_are_found_however_the_text_is_cut(
    form: str, text: str, content: str, calls: list[tuple[str, str]], size: int
) -> None:
    found = parse(ToolCalls(FORMATS[form], NAMES, 128), text, size)
    assert found[1] == calls
    assert found[0].strip() == content.strip()
    for _, arguments in found[1]:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        ("hermes", "<tool_call> not JSON </tool_call>"),
        ("hermes", '<tool_call>{"nam'),
        ("hermes", '<tool_call>add{"a": 1}</tool_call>'),
        ("json", '{"answer": 42}'),
        ("json", '{"answer": {"name": "add"}} and more'),
        ("json", f'{{"answer": 42}} {call("json")}'),
        ("json", "[1, 2]"),
        ("json", '{"name": "unknown", "arguments": {"a": 1}}'),
        ("llama3", '{"name": 5, "parameters": {}}'),
        ("mistral", "[TOOL_CALLS] !"),
    ],
)
def test_what_is_no_call_of_a_known_tool_stays_content(form: str, text: str, size: int) -> None:
    assert parse(ToolCalls(FORMATS[form], NAMES, 128), text, size) == (text, [])


def test_arguments_stream_as_they_come() -> None:
    parser = ToolCalls(FORMATS["hermes"], NAMES, 128)
    parser.push('<tool_call>{"name": "add"')
    first = parser.push(', "arguments": {"a"')
    assert [(c.name, c.arguments) for c in first.calls] == [("add", '{"a"')]
    (more,) = parser.push(": 12").calls
    assert (more.index, more.id, more.name, more.arguments) == (0, None, None, ": 12")
    assert [c.arguments for c in parser.push("}}</tool_call>").calls] == ["}"]


def test_calls_beyond_the_most_are_dropped() -> None:
    text = f"[{call('json')}, {call('json', '{}', 'add')}]"
    assert parse(ToolCalls(FORMATS["json"], NAMES, 1), text, 4) == ("", ONE)


def test_cut_call_keeps_what_came() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": 1'
    assert parse(ToolCalls(FORMATS["hermes"], NAMES, 128), text, 3) == ("", [("add", '{"a": 1')])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("<|python_tag|>", "llama3"),
        ('ipython {"parameters"}', "llama3"),
        ("[TOOL_CALLS]", "mistral"),
        ("ipython", "json"),
        ('{"parameters"}', "json"),
        ("", "json"),
    ],
)
def test_format_comes_from_the_template(template: str, name: str) -> None:
    assert call_format_of("auto", template).name == name
    assert call_format_of("mistral", template).name == "mistral"


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("<think>\nHm, a < b.\n</think>\n\nYes </think>", False, "Hm, a < b.", "Yes </think>"),
        ("Hm.\n</think>\n\nYes", True, "Hm.", "Yes"),
        ("<think></think>Yes", False, "", "Yes"),
        (" <think> cut here", False, "cut here", ""),
        ("<thin", False, "", "<thin"),
        (" Just text", False, "", " Just text"),
        ("", True, "", ""),
    ],
)
def test_reasoning_is_parted_from_the_answer(
    text: str, is_open: bool, reasoning: str, content: str, size: int
) -> None:
    for is_shown in (True, False):
        parser = Thinking(PlainText(), is_open=is_open, is_shown=is_shown)
        whole = MessagePart()
        for start in range(0, len(text), size):
            whole.add(parser.push(text[start : start + size]))
        whole.add(parser.finish())
        assert (whole.reasoning, whole.content) == (reasoning if is_shown else "", content)


def test_reasoning_comes_before_calls() -> None:
    parser = Thinking(ToolCalls(FORMATS["json"], NAMES, 9), is_open=False, is_shown=True)
    assert parse(parser, f"<think>{call('json')}</think>\n{call('json')}", 3) == ("", ONE)


def test_reasoning_parser_comes_from_the_template() -> None:
    assert reasoning_parser_of("auto", "x</think>y") == "think"
    assert reasoning_parser_of("auto", "") == "none"
    assert reasoning_parser_of("none", "</think>") == "none"


class MarksAreSpecial(ByteTokenizer):
    def token_id(self, text: str) -> int | None:
        return 256


def _tools(choice: str) -> Tools:
    listed = tuple({"type": "function", "function": {"name": name}} for name in NAMES)
    return Tools(listed, choice, NAMES if choice == "required" else NAMES[:1], is_parallel=True)


def test_grammar_writes_a_control_token_as_one() -> None:
    wanted = call_grammar(_tools("required"), FORMATS["mistral"], MarksAreSpecial(), "")
    assert wanted.text.startswith("start: <[256]> ")
    wanted = call_grammar(_tools("required"), FORMATS["mistral"], ByteTokenizer(), "")
    assert wanted.text.startswith('start: "[TOOL_CALLS]" ')
