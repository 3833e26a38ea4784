"""ChatTemplate: turns chat messages into a prompt with the checkpoint's jinja2 template.

Called by the server and the engine. Templates come with a checkpoint and are not trusted: they run
in a sandbox, in another process, with limits (see template_process.py). What a template sees is
what transformers' apply_chat_template shows it, but for text parts, see template_worker.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowprefill.errors import ConfigError, InvalidRequest
from flowprefill.models.template_process import PROCESSES

# Templates put some words around each message, and write tools as indented JSON.
LEAST_OUTPUT_CHARS = 1 << 20
OUTPUT_PER_INPUT_CHAR = 8
MAX_PARTS = 10_000  # of one message
# Names under which clients send back what a model thought; templates read the first.
REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A template; rendering keeps no state, so any thread may call it."""

    def __init__(
        self,
        text: str | None,
        special_tokens: Mapping[str, str] | None = None,
        tools_text: str | None = None,
    ) -> None:
        """Keep the template; it is compiled where it is rendered.

        Args:
            text: jinja2 source; None if the checkpoint has none.
            special_tokens: names such as ``bos_token`` that the template may use.
            tools_text: another template for chats with tools, if the checkpoint has one.
        """
        self.text = text
        self._special_tokens = dict(special_tokens or {})
        self._tools_text = tools_text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Render a prompt; special tokens are in it, so encode it without adding any.

        Args:
            messages: objects with ``role``, ``content`` (text, a list of parts
                ``{"type": "text", "text": …}``, or null) and whatever else the template reads.
            tools: function descriptions, passed to the template.
            add_generation_prompt: end with the header of the assistant's turn.
            documents: objects with ``title`` and ``text``, passed to the template.
            variables: further names for the template, e.g. ``enable_thinking``; of JSON's types.

        Raises:
            InvalidRequest: names the field of ``messages`` that is wrong; or the template is
                missing, broken, refuses the messages, or goes beyond its limits on them.

        Cost: about 0.05 ms for a short chat. Waits for another process, up to some seconds.
        """
        plain = normalized_messages(messages)
        text = self._tools_text if tools and self._tools_text is not None else self.text
        if text is None:
            raise InvalidRequest(
                "messages: this model has no chat template; send a prompt to /v1/completions",
                param="messages",
            )
        names = {
            **self._special_tokens,
            **variables,
            "messages": plain,
            "tools": list(tools) if tools else None,
            "documents": list(documents) if documents is not None else None,
            "add_generation_prompt": add_generation_prompt,
        }
        written = text_chars([plain, names["tools"], names["documents"]])
        most = LEAST_OUTPUT_CHARS + OUTPUT_PER_INPUT_CHAR * written
        return PROCESSES.render(text, names, most)

    def with_text(self, text: str) -> ChatTemplate:
        """Return a template of other text for the same model, whether tools are given or not."""
        return ChatTemplate(text, self._special_tokens)

    def warm(self) -> None:
        """Start what renders, so that the first chat does not wait for it."""
        if self.text is not None:
            PROCESSES.warm()


def read_template_file(path: str) -> str:
    """Read a template of the user's own.

    Raises:
        ConfigError: there is no such file, it is not UTF-8, or no template.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        message = f"chat_template: got {path!r}, expected a jinja2 file in UTF-8 ({error})"
        raise ConfigError(message, param="chat_template") from None
    fault = PROCESSES.fault_of(text)
    if fault:
        message = f"chat_template: got {path!r}, expected a jinja2 template ({fault})"
        raise ConfigError(message, param="chat_template")
    return text


def normalized_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy messages as templates are to see them: nulls left out, reasoning under its usual name.

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
    plain = {name: value for name, value in message.items() if value is not None}
    if "content" in plain:
        plain["content"] = checked_content(f"{where}.content", plain["content"])
    elif "content" not in message and not has_no_content(message):
        raise InvalidRequest.field(f"{where}.content", None, "text or a list of text parts")
    thought = next((plain[name] for name in REASONING if name in plain), None)
    if thought is not None:
        plain = {"thinking": thought, **plain, "reasoning_content": thought}
    return plain


def has_no_content(message: Mapping[str, Any]) -> bool:
    """Whether a message may come without content: what it says is in other fields."""
    return message.get("role") in ("assistant", "tool") or bool(message.get("tool_calls"))


def text_chars(value: Any) -> int:
    """Count the characters of all texts in a value of JSON's types."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(text_chars, value.values()))
    return sum(map(text_chars, value)) if isinstance(value, (list, tuple)) else 0


def checked_content(where: str, content: Any) -> str | list[Any]:
    """Return the content of a message: a string, or a list of parts that are all text.

    Args:
        where: the field, for errors.
    """
    if isinstance(content, str):
        return _checked(where, content)
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise InvalidRequest.field(where, content, "text or a list of text parts")
    if len(content) > MAX_PARTS:
        raise InvalidRequest.field(where, content, f"at most {MAX_PARTS} text parts")
    for index, part in enumerate(content):
        inside = f"{where}[{index}]"
        if not isinstance(part, Mapping):
            raise InvalidRequest.field(inside, part, "an object with type and text")
        if part.get("type") != "text":
            raise InvalidRequest.field(f"{inside}.type", part.get("type"), "'text'")
        if not isinstance(part.get("text"), str):
            raise InvalidRequest.field(f"{inside}.text", part.get("text"), "text")
        _checked(f"{inside}.text", part["text"])
    return list(content)


def content_text(message: Mapping[str, Any]) -> str:
    """Return the text of a checked message: its content, or all parts of it joined."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _checked(where: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest.field(where, text, "valid Unicode without lone surrogates") from None
    return text
