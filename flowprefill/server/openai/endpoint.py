"""What a generating HTTP request is made of: its order, its endpoint's shapes, its choices.

Completions and chat implement Endpoint; generation.py and streaming.py work on any of them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from aiohttp import web

from flowprefill.engine.prompt_logprobs import PromptLogprobs
from flowprefill.request import Completion, FinishReason, Request, Token
from flowprefill.server.engine_protocol import ServedEngine, ServedHandle, ServedTokenizer
from flowprefill.server.http.body import Body
from flowprefill.server.openai.message import MessageParser, MessagePart, PlainText
from flowprefill.server.openai.openai_schema import GenerationSpec, SchemaContext
from flowprefill.server.openai.replies import Envelope, metrics_object


@dataclass(frozen=True, slots=True)
class GenerationOrder:
    """A checked HTTP request, ready to submit.

    Attributes:
        spec: the fields both endpoints share.
        requests: makes the engine's requests, given the reply's id, prompt by prompt, ``spec.n``
            choices each; may tokenise or run a chat template, so it may take long for long prompts.
        choices: how many requests that makes.
        prompt_chars: characters or token ids in all of them together.
        is_rendered: whether the chat template makes the prompt, which waits for another process.
        echo: prompts to repeat before the generated text; empty for none.
        parser: makes what reads one choice's text; called after `requests`.
        whole: makes the reply of an endpoint without ``choices``; None: they all look alike.
        writer: makes what writes such an endpoint's stream.
        names: of fields in errors of the submission -> what the body calls them; see as_written.
        keeps_body: the reply repeats parts of the body, so they stay in memory till its end.
    """

    spec: GenerationSpec
    requests: Callable[[ServedEngine, str], list[Request]]
    choices: int
    prompt_chars: int
    is_rendered: bool
    echo: tuple[str | list[int], ...]
    parser: Callable[[], MessageParser] = PlainText
    whole: Callable[[Generation, list[Completion]], dict[str, Any]] | None = None
    writer: Callable[[Generation], EventWriter] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    keeps_body: bool = False

    def submitted(self) -> GenerationOrder:
        """Return it without the prompts, which are token ids now: a reply may take hours."""
        return dataclasses.replace(self, requests=_no_requests, echo=())


def _no_requests(_engine: ServedEngine, _reply_id: str) -> list[Request]:
    raise AssertionError("submitted already")


def shared_prompt(
    engine: ServedEngine, prompt: str | list[int], choices: int, *, special_tokens: bool
) -> str | list[int]:
    """Return what several choices of one prompt submit: its ids, so that it is tokenised once."""
    if choices == 1 or not isinstance(prompt, str):
        return prompt
    engine.tokenizer.check_fits(prompt, engine.max_model_len)
    return engine.tokenizer.encode(prompt, special_tokens)


class EventWriter(Protocol):
    """Turns tokens into the events of a stream; events that have a ``type`` are named by it."""

    def events_of(self, index: int, token: Token) -> list[dict[str, Any]]:
        """Return what a choice's next token brings; nothing while it is not final."""
        ...

    def ending_events(self, index: int) -> list[dict[str, Any]]:
        """Return what a choice's end brings after its last token."""
        ...

    def closing_events(self) -> list[dict[str, Any]]:
        """Return what follows the last token."""
        ...


class Endpoint(ABC):
    """What differs between /v1/completions and /v1/chat/completions."""

    path: ClassVar[str]
    id_prefix: ClassVar[str]
    reply_object: ClassVar[str]
    chunk_object: ClassVar[str]

    @abstractmethod
    def order(self, body: Body, context: SchemaContext, max_choices: int) -> GenerationOrder:
        """Check the body; raises InvalidRequest."""

    @abstractmethod
    def choice(self, part: MessagePart, logprobs: Any) -> dict[str, Any]:
        """Return a whole choice without index and finish reason."""

    @abstractmethod
    def chunk_choice(self, part: MessagePart, logprobs: Any, *, is_first: bool) -> dict[str, Any]:
        """Return a choice of one stream event without index and finish reason."""

    @abstractmethod
    def logprobs(
        self, tokens: Sequence[Token], tokenizer: ServedTokenizer, text_offset: int
    ) -> Mapping[str, Any]:
        """Return the logprobs object of consecutive tokens."""

    def with_echo(
        self,
        logprobs: Mapping[str, Any],
        prompt: PromptLogprobs,  # noqa: ARG002
        top: int,  # noqa: ARG002
        text: str,  # noqa: ARG002
        tokenizer: ServedTokenizer,  # noqa: ARG002
    ) -> Mapping[str, Any]:
        """Return the logprobs object with those of the repeated prompt's tokens before them."""
        return logprobs

    @abstractmethod
    def with_prompt_logprobs(
        self, payload: dict[str, Any], prompts: Sequence[list[dict[str, Any] | None]]
    ) -> None:
        """Put each choice's prompt_logprobs, as vLLM shows them, into a whole reply."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One HTTP request whose choices are submitted; handles are in choice order.

    ``submitted_s`` is when the first choice was, on the monotonic clock.
    """

    endpoint: Endpoint
    order: GenerationOrder
    envelope: Envelope
    engine: ServedEngine
    handles: list[ServedHandle]
    echo_texts: tuple[str, ...]
    submitted_s: float = 0.0

    def echo_text(self, choice: int) -> str:
        """Return what comes before the generated text of one choice."""
        return self.echo_texts[choice // self.order.spec.n] if self.echo_texts else ""

    def scored(self, choice: int) -> int:
        """Return whose handle has the log-probabilities of a choice's prompt: the first one's."""
        return choice - choice % self.order.spec.n

    def logprobs(
        self, tokens: Sequence[Token], text_offset: int, echoed: int | None = None
    ) -> Mapping[str, Any] | None:
        """Return the logprobs object of consecutive tokens, None unless asked for.

        Args:
            echoed: the choice that begins with these tokens, if its prompt comes before them.
        """
        top, tokenizer = self.order.spec.sampling.logprobs, self.engine.tokenizer
        if top is None:
            return None
        logprobs = self.endpoint.logprobs(tokens, tokenizer, text_offset)
        prompt = None if echoed is None else self.handles[self.scored(echoed)].prompt_logprobs
        if echoed is None or prompt is None or not self.echo_texts:
            return logprobs
        return self.endpoint.with_echo(logprobs, prompt, top, self.echo_text(echoed), tokenizer)

    @staticmethod
    def finish_reason(parser: MessageParser, reason: FinishReason | None) -> str | None:
        """Return why a choice has ended; None if it has not."""
        return "tool_calls" if reason == "stop" and parser.has_calls else reason

    def metrics(self, output_tokens: Sequence[int]) -> dict[str, Any]:
        """Return the opt-in timings, given each choice's number of tokens; all have ended.

        ``metrics`` is the first choice's; with several choices ``choice_metrics`` lists all.
        """
        each = [
            metrics_object(handle.timings, tokens)
            for handle, tokens in zip(self.handles, output_tokens, strict=True)
            if handle.timings is not None
        ]
        several = {"choice_metrics": each} if len(each) > 1 else {}
        return {"metrics": each[0], **several}


# Set once a request's choices are submitted, for the telemetry.
GENERATION = web.RequestKey("generation", Generation)
