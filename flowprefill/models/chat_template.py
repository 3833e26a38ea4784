"""ChatTemplate: turns chat messages into a prompt with the checkpoint's jinja2 template, sandboxed.

Called by the server and the engine; templates come with a checkpoint and are not trusted.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flowprefill.errors import InvalidRequest


class _GenerationTag(Extension):
    """``{% generation %}`` blocks mark assistant text for training; here they are plain."""

    tags = {"generation"}  # noqa: RUF012 - declared so by the base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateRefused(jinja2.TemplateError):
    """The template itself refused the messages (``raise_exception``)."""


def _raise_exception(message: str) -> None:
    raise TemplateRefused(message)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    # jinja2's own filter escapes for HTML, which would change what the model reads.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _strftime_now(pattern: str) -> str:
    return dt.datetime.now().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A compiled template; rendering keeps no state, so any thread may call it."""

    def __init__(self, text: str | None, special_tokens: Mapping[str, str] | None = None) -> None:
        """Keep the template; it is compiled on first use.

        Args:
            text: jinja2 source; None if the checkpoint has none.
            special_tokens: names such as ``bos_token`` that the template may use.
        """
        self.text = text
        self._special_tokens = dict(special_tokens or {})
        self._compiled: jinja2.Template | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Render a prompt; special tokens are in it, so encode it without adding any.

        Args:
            messages: objects with ``role`` and ``content``: text, or a list of parts
                ``{"type": "text", "text": …}``, which are joined.
            tools: function descriptions, passed to the template.
            add_generation_prompt: end with the header of the assistant's turn.
            variables: further names for the template, e.g. ``enable_thinking``.

        Raises:
            InvalidRequest: names the field of ``messages`` that is wrong; or the template is
                missing, broken, or refuses the messages.
        """
        plain = normalized_messages(messages)
        template = self._template()
        try:
            return template.render(
                {
                    **self._special_tokens,
                    **variables,
                    "messages": plain,
                    "tools": list(tools) if tools else None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"messages: the chat template says: {error}", param="messages"
            ) from None
        except Exception as error:  # a template can raise anything Python can
            kind = type(error).__name__
            raise InvalidRequest(
                f"messages: the chat template failed with {kind}: {error}", param="messages"
            ) from None

    def _template(self) -> jinja2.Template:
        if self.text is None:
            raise InvalidRequest(
                "messages: this model has no chat template; send a prompt to /v1/completions",
                param="messages",
            )
        if self._compiled is None:
            try:
                self._compiled = _environment().from_string(self.text)
            except jinja2.TemplateSyntaxError as error:
                raise InvalidRequest(
                    f"messages: the model's chat template is broken: line {error.lineno}: {error}",
                    param="messages",
                ) from None
        return self._compiled


def normalized_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy messages with every content a string (or None next to tool calls).

    Raises:
        InvalidRequest: names ``messages[i].role``, ``.content`` or ``.content[j].type``.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequest.field("messages", messages, "a list of at least one message")
    return [_normalized(index, message) for index, message in enumerate(messages)]


def _normalized(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise InvalidRequest.field(where, message, "an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest.field(f"{where}.role", role, "a role such as 'user'")
    plain = dict(message)
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        plain["content"] = None
    else:
        plain["content"] = content_text(f"{where}.content", content)
    return plain


def content_text(where: str, content: Any) -> str:
    """Return the text of a message: a string, or parts that are all text, joined.

    Args:
        where: the field, for errors.
    """
    if isinstance(content, str):
        return _checked(where, content)
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise InvalidRequest.field(where, content, "text or a list of text parts")
    texts: list[str] = []
    for index, part in enumerate(content):
        inside = f"{where}[{index}]"
        if not isinstance(part, Mapping):
            raise InvalidRequest.field(inside, part, "an object with type and text")
        if part.get("type") != "text":
            raise InvalidRequest.field(f"{inside}.type", part.get("type"), "'text'")
        if not isinstance(part.get("text"), str):
            raise InvalidRequest.field(f"{inside}.text", part.get("text"), "text")
        texts.append(_checked(f"{inside}.text", part["text"]))
    return "".join(texts)


def _checked(where: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest.field(where, text, "valid Unicode without lone surrogates") from None
    return text
