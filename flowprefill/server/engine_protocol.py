"""What the server needs from an engine, as protocols; the engine and the tests' one fulfil them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from typing import Any, Protocol

from flowprefill.config import EngineConfig
from flowprefill.engine.prompt_logprobs import PromptLogprobs
from flowprefill.engine.records import EngineObserver, EngineStats, TimelineEntry
from flowprefill.request import SLO, Completion, Request, StructuredOutput, Timings, Token


class ServedTokenizer(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def check_fits(self, text: str, max_tokens: int) -> None:
        """Raise PromptTooLong if the text's size alone tells that it has too many tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_id(self, text: str) -> int | None:
        """Id of the token spelled exactly so, or None."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token, which output text leaves out."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, as UTF-8 that may be part of a character."""
        ...


class ServedHandle(Protocol):
    """One submitted request; used from the server's event loop.

    Iterating or awaiting raises the FlowPrefillError that ended the request, if one did. A wait for
    a token may be cancelled and tried again: none is lost.
    """

    @property
    def request_id(self) -> str: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Those of the prompt, if they were asked for; there before the first token."""
        ...

    @property
    def output_tokens(self) -> int:
        """How many tokens have been generated so far."""
        ...

    @property
    def timings(self) -> Timings | None:
        """Where the time went; None before the end."""
        ...

    def __aiter__(self) -> AsyncIterator[Token]: ...

    def __await__(self) -> Generator[Any, None, Completion]: ...

    def cancel(self) -> None:
        """End the request at the next boundary; nothing happens if it has ended already."""
        ...

    def hold(self) -> None:
        """Have no more tokens made until `resume`; till then only `cancel` ends the request."""
        ...

    def resume(self) -> None:
        """End that; nothing happens if the request is not held, or has ended."""
        ...


class ServedEngine(Protocol):
    """The engine behind the server."""

    @property
    def model_id(self) -> str: ...
    @property
    def config(self) -> EngineConfig: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def created(self) -> int:
        """When the model was loaded, seconds since the epoch."""
        ...

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """How the model's authors want it sampled; see models/sampling_defaults.py."""
        ...

    @property
    def tokenizer(self) -> ServedTokenizer: ...
    @property
    def chat_template(self) -> str:
        """The source of the model's chat template; empty if it has none."""
        ...

    @property
    def is_ready(self) -> bool: ...
    @property
    def has_failed(self) -> bool:
        """Whether it can take no requests any more, ever."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What it runs on and why: device, dtype, threads, reason, in words for ``/ready``."""
        ...

    def render_chat(self, messages: list[dict[str, Any]], /, **template_kwargs: Any) -> str:
        """Messages to prompt text; raises InvalidRequest if the template refuses them."""
        ...

    def check_load(self, tenant: str = "") -> None:
        """Raise Overloaded if a request would be refused whatever it is."""
        ...

    def predicted_work_s(self, requests: Sequence[Request]) -> float:
        """Time that requests of one client would take on an idle device; 0 if it is not known."""
        ...

    def knows_grammar(self, wanted: StructuredOutput) -> bool:
        """Whether `submit` would not have to compile it, which takes up to a second or two."""
        ...

    def compile_grammar(self, wanted: StructuredOutput) -> None:
        """Compile it now; what is wrong with it, `submit` says. Raises ProcessNotStarted."""
        ...

    def submit(self, request: Request, slo: SLO | None = None) -> ServedHandle:
        """Admit a request; any thread.

        Raises InvalidRequest, PromptTooLong, Overloaded or NotReady.
        """
        ...

    def stats(self) -> EngineStats: ...

    def subscribe(self, observer: EngineObserver) -> None: ...

    def timeline(self, since: int = 0) -> Sequence[TimelineEntry]:
        """The segments executed last, oldest first, without the first `since` of all."""
        ...

    def decisions(self) -> list[dict[str, Any]]:
        """The most recent scheduling decisions with their reasons, oldest first."""
        ...

    def story(self, request_id: str) -> dict[str, Any] | None:
        """What happened to one of the last requests and why; None if it is not known."""
        ...

    def recent_requests(self, reply_id: str = "") -> list[dict[str, Any]]:
        """The last requests in short, the newest first; or only the choices of one reply."""
        ...

    def close(self, timeout: float | None = None) -> None:
        """Refuse new requests, wait up to ``timeout`` seconds for the others, cancel the rest."""
        ...
