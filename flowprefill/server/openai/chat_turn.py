"""ChatTurn: from a checked chat request to its prompt, its sampling and the reading of its replies.

Made by chat.py from the body; used when the request is submitted and when its text comes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from flowprefill.errors import InvalidRequest
from flowprefill.models.chat_template import content_text
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
        text = engine.render_chat(messages, **given, **self.variables)
        if self.continues:
            text = _cut_after(text, content_text(messages[-1]))
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

    def parser(self) -> MessageParser:
        """Return what reads one reply."""
        parser: MessageParser = PlainText()
        if self.tools.listed:
            parser = ToolCalls(self.form, self.tools.allowed, self.tools.max_calls)
        if self.is_thinking and not self.prompt_tail.endswith(CLOSE):
            is_open = self.prompt_tail.endswith(OPEN)
            parser = Thinking(parser, is_open=is_open, is_shown=self.shows_reasoning)
        return parser


def _cut_after(prompt: str, content: str) -> str:
    """Return the prompt up to the end of the last message's content."""
    content = content.strip()
    start = prompt.rfind(content)
    if start < 0 or not content:
        raise InvalidRequest(
            "continue_final_message: the chat template changes the last message, or it is empty",
            param="continue_final_message",
        )
    return prompt[: start + len(content)]
