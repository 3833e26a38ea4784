"""ChatTemplate: turns chat messages into a prompt with the checkpoint's jinja2 template.

Called by the server and the engine. Templates come with a checkpoint and are not trusted: they run
in a sandbox, in another process, with limits (see template_process.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowprefill.errors import InvalidRequest
from flowprefill.models.template_process import PROCESSES

# Templates put some words around each message, and write tools as indented JSON.
LEAST_OUTPUT_CHARS = 1 << 20
OUTPUT_PER_INPUT_CHAR = 8


class ChatTemplate:
    """A template; rendering keeps no state, so any thread may call it."""

    def __init__(self, text: str | None, special_tokens: Mapping[str, str] | None = None) -> None:
        """Keep the template; it is compiled where it is rendered.

        Args:
            text: jinja2 source; None if the checkpoint has none.
            special_tokens: names such as ``bos_token`` that the template may use.
        """
        self.text = text
        self._special_tokens = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
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
            variables: further names for the template, e.g. ``enable_thinking``; of JSON's types.

        Raises:
            InvalidRequest: names the field of ``messages`` that is wrong; or the template is
                missing, broken, refuses the messages, or goes beyond its limits on them.

        Cost: about 0.05 ms for a short chat. Waits for another process, up to some seconds.
        """
        plain = normalized_messages(messages)
        if self.text is None:
            raise InvalidRequest(
                "messages: this model has no chat template; send a prompt to /v1/completions",
                param="messages",
            )
        names = {
            **self._special_tokens,
            **variables,
            "messages": plain,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        written = sum(len(message["content"] or "") for message in plain)
        most = LEAST_OUTPUT_CHARS + OUTPUT_PER_INPUT_CHAR * written
        return PROCESSES.render(self.text, names, most)

    def warm(self) -> None:
        """Start what renders, so that the first chat does not wait for it."""
        if self.text is not None:
            PROCESSES.warm()


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


MAX_PARTS = 10_000  # of one message


def content_text(where: str, content: Any) -> str:
    """Return the text of a message: a string, or parts that are all text, joined.

    Args:
        where: the field, for errors.
    """
    if isinstance(content, str):
        return _checked(where, content)
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise InvalidRequest.field(where, content, "text or a list of text parts")
    if len(content) > MAX_PARTS:
        raise InvalidRequest.field(where, content, f"at most {MAX_PARTS} text parts")
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
