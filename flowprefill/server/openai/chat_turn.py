"""ChatTurn: from a checked chat request to its prompt, its sampling and the reading of its replies.

Made by chat.py from the body; used when the request is submitted and when its text comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowprefill.errors import InvalidRequest
from flowprefill.request import SamplingParams
from flowprefill.server.engine_protocol import ServedEngine, ServedTokenizer
from flowprefill.server.openai.message import MessageParser, PlainText
from flowprefill.server.openai.reasoning import CLOSE, OPEN, Thinking
from flowprefill.server.openai.tool_parsers import CallFormat, ToolCalls
from flowprefill.server.openai.tools import (
    Tools,
    call_grammar,
    control_token,
    messages_without_tools,
)


@dataclass
class ChatTurn:
    """One chat request's prompt and how its replies are read; made from the body.

    Attributes:
        continues: the reply continues the last message.
        is_thinking: the model's replies may begin with reasoning.
        shows_reasoning: the client wants to see it.
        prompt_tail: end of the rendered prompt, once it is.
    """

    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    tools: Tools
    form: CallFormat
    continues: bool = False
    is_thinking: bool = False
    shows_reasoning: bool = True
    prompt_tail: str = ""

    def render(self, engine: ServedEngine) -> str:
        """Return the prompt; waits for the process that renders."""
        messages, given = self.messages, {}
        if "tools" in engine.chat_template:
            given = {"tools": list(self.tools.listed)} if self.tools.listed else {}
        elif self.tools.listed or any("tool_calls" in m or m["role"] == "tool" for m in messages):
            messages = messages_without_tools(messages, self.tools)
        if self.continues:
            messages = [*messages[:-1], _marked(messages[-1])]
        text = engine.render_chat(messages, **given, **self.variables)
        if self.continues:
            text = _cut_at_mark(text, _last_text(self.messages[-1]))
        self.prompt_tail = text[-200:].rstrip()
        return text

    def sampling(self, given: SamplingParams, tokenizer: ServedTokenizer) -> SamplingParams:
        """Return the sampling, with what the tools ask for; the prompt has been rendered."""
        changes: dict[str, Any] = {}
        if self.tools.listed and control_token(self.form.opening, tokenizer) is not None:
            changes["skip_special_tokens"] = False  # the parser looks for it
        after = CLOSE if self.is_thinking and not self.prompt_tail.endswith(CLOSE) else ""
        if self.tools.must_call:
            changes["structured"] = call_grammar(self.tools, self.form, tokenizer, after)
        elif given.structured is not None and after:
            changes["structured"] = dataclasses.replace(given.structured, after=after)
        return dataclasses.replace(given, **changes) if changes else given

    def forget_prompt(self) -> None:
        """Let go of what only the prompt is made of, before the reply is waited for."""
        self.messages, self.variables = [], {}
        self.tools = dataclasses.replace(self.tools, listed=())

    def parser(self) -> MessageParser:
        """Return what reads one reply."""
        parser: MessageParser = PlainText()
        if self.tools.allowed:
            parser = ToolCalls(self.form, self.tools.allowed, self.tools.max_calls)
        if self.is_thinking and not self.prompt_tail.endswith(CLOSE):
            is_open = self.prompt_tail.endswith(OPEN)
            parser = Thinking(parser, is_open=is_open, is_shown=self.shows_reasoning)
        return parser


# Written after the last message's content to find its end in the prompt. The space at its end
# tells whether the template keeps white space there or trims it, as in transformers.
_MARK = "FLOWPREFILL_CONTINUES_HERE "


def _last_text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return str(content if isinstance(content, str) else content[-1]["text"])


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with the mark at the end of its content."""
    content = message.get("content")
    if isinstance(content, list) and content:
        last = {**content[-1], "text": content[-1]["text"] + _MARK}
        return {**message, "content": [*content[:-1], last]}
    return {**message, "content": (content or "") + _MARK}


def _cut_at_mark(prompt: str, last_text: str) -> str:
    """Return the prompt up to the end of the last message, whose text has to be in it."""
    start = prompt.rfind(_MARK.strip())
    if start < 0 or not last_text.strip() or last_text.strip() not in prompt[:start]:
        raise InvalidRequest(
            "continue_final_message: the chat template changes the last message, or it is empty",
            param="continue_final_message",
        )
    before = prompt[:start]
    return before if prompt.startswith(_MARK, start) else before.rstrip()
