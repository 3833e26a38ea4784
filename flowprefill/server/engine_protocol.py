"""What the server needs from an engine, as protocols; the engine and the tests' one fulfil them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterable, Mapping, Sequence
from typing import Any, Protocol

from flowprefill.config import EngineConfig
from flowprefill.request import SLO, Completion, FinishReason, Request, Timings, Token


class ServedTokenizer(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def check_fits(self, text: str, max_tokens: int) -> None:
        """Raise PromptTooLong if the text's size alone tells that it has too many tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, as UTF-8 that may be part of a character."""
        ...


class ServedHandle(Protocol):
    """One submitted request; used from the server's event loop.

    Iterating or awaiting raises the FlowPrefillError that ended the request, if one did.
    """

    @property
    def request_id(self) -> str: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def timings(self) -> Timings | None:
        """Where the time went; None before the end."""
        ...

    def __aiter__(self) -> AsyncIterator[Token]: ...

    def __await__(self) -> Generator[Any, None, Completion]: ...

    def cancel(self) -> None:
        """End the request at the next boundary; nothing happens if it has ended already."""
        ...


class EngineStatsView(Protocol):
    """A snapshot of the engine's gauges and counters, taken at every scrape."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def suspended(self) -> int: ...
    @property
    def kv_blocks_used(self) -> int: ...
    @property
    def kv_blocks_total(self) -> int: ...
    @property
    def kv_blocks_cached(self) -> int:
        """Blocks held by no request and reusable by their content."""
        ...

    @property
    def workspace_bytes(self) -> int:
        """Activations of all live runs."""
        ...

    @property
    def segments(self) -> int:
        """Segments executed since the start."""
        ...

    @property
    def max_blocking_s(self) -> float:
        """Longest time from a dispatch to its first segment since the start."""
        ...

    @property
    def prefix_cache_queries(self) -> int:
        """Prompt tokens looked up in the prefix cache since the start."""
        ...

    @property
    def prefix_cache_hits(self) -> int:
        """Prompt tokens found in the prefix cache since the start."""
        ...


class RequestRecord(Protocol):
    """What an observer is told about one request at its terminal event."""

    @property
    def request_id(self) -> str: ...
    @property
    def slo(self) -> SLO: ...
    @property
    def timings(self) -> Timings: ...
    @property
    def finish_reason(self) -> FinishReason: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def token_gaps_s(self) -> Sequence[float]:
        """Seconds between consecutive output tokens; one less than ``output_tokens``, or empty."""
        ...

    @property
    def cancel_to_free_s(self) -> float | None:
        """From the call of ``cancel`` to its KV blocks being free; None unless cancelled."""
        ...


class EngineObserver(Protocol):
    """Called by the engine on its own thread; must be quick and must not raise."""

    def on_end(self, record: RequestRecord) -> None:
        """Exactly once per admitted request, after its blocks were freed."""
        ...

    def on_preemption(self, reason: str, ack_s: float) -> None:
        """A prefill was suspended; ``ack_s``: dispatch to the newcomer's first segment, seconds."""
        ...

    def on_decision(self, seconds: float) -> None:
        """The scheduler decided once; how long that took."""
        ...


class TimelineEntry(Protocol):
    """One executed segment."""

    @property
    def run(self) -> str:
        """``prefill REQUEST``, ``prefill of N`` or ``decode of N``."""
        ...

    @property
    def segment(self) -> str: ...
    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...
    @property
    def predicted_s(self) -> float: ...


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
    def tokenizer(self) -> ServedTokenizer: ...
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

    def submit(self, request: Request, slo: SLO | None = None) -> ServedHandle:
        """Admit a request; any thread.

        Raises InvalidRequest, PromptTooLong, Overloaded or NotReady.
        """
        ...

    def stats(self) -> EngineStatsView: ...

    def subscribe(self, observer: EngineObserver) -> None: ...

    def timeline(self) -> Iterable[TimelineEntry]: ...

    def decisions(self) -> list[dict[str, Any]]:
        """The most recent scheduling decisions with their reasons, oldest first."""
        ...

    def close(self, timeout: float | None = None) -> None:
        """Refuse new requests, wait up to ``timeout`` seconds for the others, cancel the rest."""
        ...
