"""Who answers in `flowprefill chat`: a server over HTTP, or an engine in this process."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flowprefill.client import bearer, refusal_of, server_url, why_no_answer
from flowprefill.errors import FlowPrefillError, InvalidRequest, shortened
from flowprefill.request import SLO, Request, SamplingParams

CONNECT_S = 600.0  # also the longest silence; servers send comments while they compute
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class TalkSettings:
    """What an answer is asked with.

    Attributes:
        ttft_ms: objective for the first token; None: the default's.
    """

    max_tokens: int
    temperature: float
    ttft_ms: float | None = None


class Talk(Protocol):
    """Answers a conversation."""

    @property
    def model(self) -> str:
        """The model's name."""
        ...

    def answer(
        self, messages: Sequence[Message], settings: TalkSettings
    ) -> Generator[str, None, None]:
        """Yield the answer's text as it comes; closing the iterator cancels the rest.

        Raises:
            FlowPrefillError: it was refused or failed, with the reason.
        """
        ...


class EngineTalk:
    """A model in this process; ``engine`` is an Engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.model = str(engine.model_id)

    def answer(
        self, messages: Sequence[Message], settings: TalkSettings
    ) -> Generator[str, None, None]:
        """Yield the answer's text as it comes; see Talk."""
        prompt = self._engine.render_chat([dict(m) for m in messages], add_generation_prompt=True)
        sampling = SamplingParams(max_tokens=settings.max_tokens, temperature=settings.temperature)
        slo = SLO(ttft=None if settings.ttft_ms is None else settings.ttft_ms / 1e3)
        handle = self._engine.submit(Request(prompt, sampling, add_special_tokens=False), slo)
        try:
            for token in handle:
                if token.text:
                    yield token.text
        finally:
            handle.cancel()  # one that has ended is not touched


class ServerTalk:
    """A server that speaks OpenAI's chat completions.

    Args:
        url: http://HOST:PORT.
        key: sent as ``Authorization: Bearer``; empty for none, None for the environment's.
        model: name to ask for; empty: the first that the server lists.

    Raises:
        InvalidRequest: that is no URL or no key, or the server refuses to list its models.
        FlowPrefillError: there is no such server.
    """

    def __init__(self, url: str, key: str | None = "", model: str = "") -> None:
        self._url = server_url(url).removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", **bearer(key)}
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        with self._open("/v1/models") as reply:
            try:
                return str(json.load(reply)["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                message = f"{self._url}/v1/models: not a list of models; name one after chat"
                raise InvalidRequest(message) from None

    @contextlib.contextmanager
    def _open(self, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        """Send a request; every failure up to the end of the reply is a FlowPrefillError."""
        raw = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, raw, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=CONNECT_S) as reply:
                yield reply
        except urllib.error.HTTPError as error:
            raise InvalidRequest(refusal_of(error)) from None
        except (OSError, http.client.HTTPException) as error:
            raise FlowPrefillError(f"{self._url}: {why_no_answer(error)}") from None

    def answer(
        self, messages: Sequence[Message], settings: TalkSettings
    ) -> Generator[str, None, None]:
        """Yield the answer's text as it comes; see Talk."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "stream": True,
        }
        if settings.ttft_ms is not None:
            body["slo"] = {"ttft_ms": settings.ttft_ms}
        has_ended = False
        with self._open("/v1/chat/completions", body) as reply:
            for line in reply:
                name, _, event = line.partition(b":")
                if name == b"data":
                    texts, is_last = _read_event(event)
                    has_ended = has_ended or is_last
                    yield from texts
        if not has_ended:
            raise FlowPrefillError(f"{self._url}: the stream broke off before the answer's end")


def _read_event(raw: bytes) -> tuple[list[str], bool]:
    """Return what one event adds to the answer, reasoning included, and whether that is its end."""
    if raw.strip() == b"[DONE]":
        return [], True
    try:
        event = json.loads(raw)
        failed = event.get("error")
        texts = [
            str(choice["delta"][name])
            for choice in event.get("choices") or ()
            for name in ("reasoning_content", "content")
            if choice.get("delta", {}).get(name)
        ]
        is_last = any(choice.get("finish_reason") for choice in event.get("choices") or ())
        message = None if failed is None else str(failed.get("message", "the stream has failed"))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise FlowPrefillError(f"the stream holds what is no event: {shortened(raw)}") from None
    if message is not None:
        raise FlowPrefillError(message)
    return texts, is_last
