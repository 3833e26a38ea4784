"""An engine without a model for the server tests: scripted tokens, gates, failures.

One thread per request plays the executor. Its tokenizer's ids are the bytes of UTF-8, so a
character of several bytes is several tokens of which only the last has text.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowprefill.config import EngineConfig
from flowprefill.engine.prompt_logprobs import SCORE, PromptLogprobs
from flowprefill.errors import (
    FlowPrefillError,
    InvalidRequest,
    NotReady,
    PromptTooLong,
    RequestCancelled,
)
from flowprefill.request import (
    SLO,
    Completion,
    FinishReason,
    Request,
    StructuredOutput,
    Timings,
    Token,
    TokenLogprob,
)

BOS, EOS, VOCAB = 256, 257, 258
WAIT_S = 100.0  # for a bug that would hang; nothing waits this long otherwise


class ByteTokenizer:
    """Bytes as tokens; 256 is BOS, 257 EOS, both without text."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([BOS] if add_special_tokens else []) + list(text.encode())

    def check_fits(self, text: str, max_tokens: int) -> None:
        if len(text) >= max_tokens:
            raise PromptTooLong(f"prompt: got {len(text)} characters", param="prompt")

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def token_id(self, text: str) -> int | None:
        return {"<bos>": BOS, "<eos>": EOS}.get(text)

    def is_special(self, token_id: int) -> bool:
        return token_id >= BOS

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<bos>" if token_id == BOS else b"<eos>"


def fake_scores(ids: Sequence[int]) -> Any:
    """Each token has logprob -1 and rank 2; the token before it in the vocabulary -0.5."""
    scores = np.zeros(len(ids), SCORE)
    after = np.array([*ids[1:], 0])
    scores["target_logit"], scores["rank"] = -1.0, 2
    scores["top_ids"] = (after[:, None] + np.array([-1, 0, *range(1, 19)])) % VOCAB
    scores["top_logits"] = -0.5 * np.arange(1, 21)
    return scores


def fake_embedding(tokens: int, pooling: str) -> Any:
    return np.array([0.6, -0.8, tokens, pooling == "mean"], np.float32)


@dataclass
class Script:
    """What the engine does with the next requests.

    `gate` holds the prefill, `gates` hold before the given token; `error` ends the request before
    token `error_at`.
    """

    text: str = "Hello world"
    finish: FinishReason = "stop"
    gate: threading.Event | None = None
    gates: dict[int, threading.Event] = field(default_factory=dict)
    error: Exception | None = None
    error_at: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Record:
    request_id: str
    slo: SLO
    timings: Timings
    finish_reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    token_gaps_s: tuple[float, ...] = ()
    cancel_to_free_s: float | None = None


@dataclass(frozen=True)
class Stats:
    running: int = 0
    waiting: int = 0
    suspended: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 100
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    kv_blocks_cached: int = 0
    workspace_bytes: int = 0
    segments: int = 0
    max_blocking_s: float = 0.0
    held: int = 0


@dataclass(frozen=True)
class Segment:
    run: str
    segment: str
    start_s: float
    end_s: float
    predicted_s: float = 0.0
    run_id: int = 0


class FakeHandle:
    """One request; every method from any thread."""

    def __init__(self, engine: FakeEngine, request: Request, slo: SLO, script: Script) -> None:
        self.request, self.slo, self._script, self._engine = request, slo, script, engine
        self.request_id = request.id
        ids = request.prompt
        if isinstance(ids, str):
            ids = engine.tokenizer.encode(ids, request.add_special_tokens)
        self.prompt_tokens = len(ids)
        self.cached_tokens = script.cached_tokens
        self.tokens: list[Token] = []
        self.error: Exception | None = None
        self.cancels = 0
        self.ended = threading.Event()
        self._cancelled = threading.Event()
        self.flows = threading.Event()  # no token is made while it is held
        self.flows.set()
        self.holds = 0
        self._lock = threading.Lock()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self.timings: Timings | None = None
        self.embedding: Any = None
        self.prompt_logprobs: PromptLogprobs | None = None
        top = request.sampling.prompt_logprobs
        if top is not None:
            self.prompt_logprobs = PromptLogprobs(ids, fake_scores(ids), top)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens)

    def _timings(self, ttft: float | None) -> Timings:
        met = None if self.slo.ttft is None else ttft is not None and ttft <= self.slo.ttft
        return Timings(
            queue=0.001, prefill_run=0.004, suspended=0.002, preemptions=1, ttft=ttft,
            predicted_ttft=0.005, total=0.02, mean_itl=0.001, slo_met=met,
            cached_tokens=self.cached_tokens, preprocess=0.00025,
            suspensions=((0.003, 0.005),),
        )  # fmt: skip

    def cancel(self) -> None:
        self.cancels += 1
        self._cancelled.set()

    def hold(self) -> None:
        self.holds += 1
        self.flows.clear()

    def resume(self) -> None:
        self.flows.set()

    def _wake(self) -> None:
        with self._lock:
            waiters = list(self._waiters)
        for loop, event in waiters:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop has ended; no task waits there
                pass

    def _hold(self, gate: threading.Event | None) -> None:
        deadline = time.monotonic() + WAIT_S
        while gate is not None and not gate.wait(0.005):
            if self._cancelled.is_set() or time.monotonic() > deadline:
                break
        if self._cancelled.is_set():
            raise RequestCancelled(f"request {self.request_id} was cancelled")

    def run(self) -> None:
        """Play the script; the request's thread."""
        reason: FinishReason
        try:
            self._hold(self._script.gate)
            reason = self._generate()
        except FlowPrefillError as error:
            self.error = error
            reason = "cancelled" if isinstance(error, RequestCancelled) else "failed"
        except Exception as error:
            self.error, reason = error, "failed"
        self.timings = self._timings(0.008 if self.tokens else None)
        self._engine.end(self, reason)
        self.ended.set()
        self._wake()

    def _generate(self) -> FinishReason:
        sampling = self.request.sampling
        ids = list(self._script.text.encode())
        finish: FinishReason = self._script.finish
        if finish == "stop":
            ids.append(EOS)
        if self.request.pooling is not None:
            self.embedding = fake_embedding(self.prompt_tokens, self.request.pooling)
            return "stop"
        if sampling.max_tokens is not None and len(ids) > sampling.max_tokens:
            ids, finish = ids[: sampling.max_tokens], "length"
        pending = b""
        for index, token_id in enumerate(ids):
            self._hold(self._script.gates.get(index))
            if not self.flows.is_set():
                self._hold(self.flows)
            if self._script.error is not None and index == self._script.error_at:
                raise self._script.error
            pending += bytes([token_id]) if token_id < 256 else b""
            try:
                text, pending = pending.decode(), b""
            except UnicodeDecodeError:
                text = ""
            is_last = index == len(ids) - 1
            self._emit(token_id, text, finish if is_last else None)
        return finish

    def _emit(self, token_id: int, text: str, finish: FinishReason | None) -> None:
        count = self.request.sampling.logprobs
        logprob = None if count is None else -0.5
        top = tuple(TokenLogprob((token_id + k) % VOCAB, -0.5 - k) for k in range(count or 0))
        with self._lock:
            self.tokens.append(Token(token_id, text, logprob, top, finish))
        self._wake()

    def __aiter__(self) -> AsyncIterator[Token]:
        return FakeTokens(self)

    async def token_at(self, position: int) -> Token | None:
        """The token, or None at the end; a wait that is cancelled changes nothing."""
        event = asyncio.Event()
        entry = (asyncio.get_running_loop(), event)
        with self._lock:
            self._waiters.append(entry)
        try:
            while True:
                event.clear()
                has_ended = self.ended.is_set()
                if position < len(self.tokens):
                    return self.tokens[position]
                if has_ended:
                    if self.error is not None:
                        raise self.error
                    return None
                await event.wait()
        finally:
            with self._lock:
                self._waiters.remove(entry)

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._completion().__await__()

    async def _completion(self) -> Completion:
        async for _ in self:
            pass
        return self._whole()

    def _whole(self) -> Completion:
        assert self.timings is not None
        reason: FinishReason = "length" if self.embedding is None else "stop"
        reason = (self.tokens[-1].finish_reason or "stop") if self.tokens else reason
        text = "".join(token.text for token in self.tokens)
        return Completion(
            self.request_id,
            self.prompt_tokens,
            text,
            tuple(self.tokens),
            reason,
            self.timings,
            self.prompt_logprobs,
            self.embedding,
        )

    def __iter__(self) -> Iterator[Token]:
        self.ended.wait()
        if self.error is not None:
            raise self.error
        return iter(self.tokens)

    def result(self, timeout: float | None = None) -> Completion:
        if not self.ended.wait(timeout):
            raise TimeoutError(f"request {self.request_id} has not ended after {timeout} s")
        if self.error is not None:
            raise self.error
        return self._whole()


class FakeTokens:
    """One reader's position among a handle's tokens."""

    def __init__(self, handle: FakeHandle) -> None:
        self._handle, self._position = handle, 0

    def __aiter__(self) -> FakeTokens:
        return self

    async def __anext__(self) -> Token:
        token = await self._handle.token_at(self._position)
        if token is None:
            raise StopAsyncIteration
        self._position += 1
        return token


class FakeEngine:
    """The engine; `script` rules the requests submitted after it is set."""

    def __init__(self, config: EngineConfig | None = None, model_id: str = "fake-model") -> None:
        self.config = config or EngineConfig()
        self.model_id = model_id
        self.max_model_len = 4_000_000
        self.vocab_size = VOCAB
        self.sampling_defaults: dict[str, Any] = {}
        self.created = 1_700_000_000
        self.tokenizer = ByteTokenizer()
        self.chat_template = ""
        self.rendered: list[dict[str, Any]] = []
        self.is_ready = True
        self.has_failed = False
        self.script = Script()
        self.submit_error: Exception | None = None
        self.submit_gate: threading.Event | None = None
        self.compile_gate: threading.Event | None = None
        self.grammars: list[StructuredOutput] = []
        self.load_error: Exception | None = None
        self.seconds_per_token = 0.0
        self.submitted: list[FakeHandle] = []
        self.ends: list[Record] = []
        self.current_stats = Stats()
        self.segments: list[Segment] = []
        self.decided: list[dict[str, Any]] = [
            {"event": "arrival", "reason": "nothing runs", "run": "a"}
        ]
        self._observers: list[Any] = []
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()

    def describe(self) -> dict[str, Any]:
        return {"device": "cpu", "reason": "no GPU in this build", "dtype": "f32", "threads": 1}

    def render_chat(self, messages: list[dict[str, Any]], /, **variables: Any) -> str:
        if variables.get("refuse"):
            raise InvalidRequest("messages: the chat template refuses them", param="messages")
        self.rendered.append({"messages": messages, **variables})
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return text + ("<assistant>" if variables.get("add_generation_prompt") else "")

    def warm_chat(self) -> None:
        """Nothing renders here that would have to be started."""

    def warm_structured(self) -> None:
        """Nothing compiles grammars here."""

    def knows_grammar(self, wanted: StructuredOutput) -> bool:
        return wanted in self.grammars

    def compile_grammar(self, wanted: StructuredOutput) -> None:
        if self.compile_gate is not None:
            self.compile_gate.wait(WAIT_S)
        self.grammars.append(wanted)

    def check_load(self, tenant: str = "") -> None:
        if self.load_error is not None:
            raise self.load_error

    def predicted_work_s(self, requests: Sequence[Request]) -> float:
        return self.seconds_per_token * sum(one.sampling.max_tokens or 1 for one in requests)

    def submit(self, request: Request, slo: SLO | None = None) -> FakeHandle:
        if self.submit_gate is not None:
            self.submit_gate.wait(WAIT_S)
        if self.submit_error is not None:
            raise self.submit_error
        if not self.is_ready:
            raise NotReady("the engine is closed")
        handle = FakeHandle(self, request, slo or self.config.default_slo(), self.script)
        thread = threading.Thread(target=handle.run, daemon=True)
        with self._changed:
            self.submitted.append(handle)
            self._threads.append(thread)
            self._changed.notify_all()
        thread.start()
        return handle

    def end(self, handle: FakeHandle, reason: FinishReason) -> None:
        """Record the terminal event; the request's thread."""
        assert handle.timings is not None
        record = Record(
            handle.request_id, handle.slo, handle.timings, reason,
            handle.prompt_tokens, len(handle.tokens), (0.001,) * max(len(handle.tokens) - 1, 0),
            0.0001 if reason == "cancelled" else None,
        )  # fmt: skip
        for observer in self._observers:
            observer.on_end(record)
        with self._changed:
            self.ends.append(record)
            self._changed.notify_all()

    def wait_submitted(self, count: int) -> FakeHandle:
        """Wait until `count` requests were submitted; returns the last of them."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.submitted) >= count, WAIT_S)
            return self.submitted[count - 1]

    def wait_ended(self, count: int) -> list[Record]:
        """Wait until `count` requests have ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ends) >= count, WAIT_S)
            return list(self.ends)

    def stats(self) -> Stats:
        return self.current_stats

    def subscribe(self, observer: Any) -> None:
        self._observers.append(observer)

    def preempt(self, reason: str, ack_s: float) -> None:
        """Tell the observers about a preemption and the decision before it."""
        for observer in self._observers:
            observer.on_decision(2e-5)
            observer.on_preemption(reason, ack_s)

    def timeline(self, since: int = 0) -> list[Segment]:
        return self.segments[since:]

    def decisions(self) -> list[dict[str, Any]]:
        return self.decided

    def story(self, request_id: str) -> dict[str, Any] | None:
        known = {handle.request_id for handle in self.submitted}
        return {"id": request_id, "events": []} if request_id in known else None

    def recent_requests(self, reply_id: str = "") -> list[dict[str, Any]]:
        prefix = f"{reply_id}-" if reply_id else ""
        ids = [handle.request_id for handle in reversed(self.submitted)]
        return [{"id": one} for one in ids if one.startswith(prefix)]

    def close(self, timeout: float | None = None) -> None:
        self.is_ready = False
        for handle in list(self.submitted):
            if not handle.ended.wait(timeout):
                handle.cancel()
        for thread in self._threads:
            thread.join(WAIT_S)
