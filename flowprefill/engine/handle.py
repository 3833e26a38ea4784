"""Handle: what Engine.submit returns; the engine feeds it, users read it from threads or asyncio.

One producer (the engine's event thread, or the thread that ends the request), any number of
consumers. Tokens are kept in a list and every iterator has its own position, so each consumer sees
all of them. A consumer that has to wait leaves a *waker* (a thread's event or an asyncio future's
resolver); the producer takes the wakers under the lock and calls them outside of it. If no one is
waiting, push only appends.

The lock may be taken again by the thread that has it: where a signal handler or a finalizer, run in
the middle of the little that it guards, cancels the request or ends it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowprefill.engine.prompt_logprobs import PromptLogprobs
    from flowprefill.errors import FlowPrefillError
    from flowprefill.request import Completion, Timings, Token

Waker = Callable[[], None]


class Handle:
    """One submitted request: iterate its tokens, await or ask for its result, cancel it.

    ``for token in handle``, ``async for token in handle``, ``completion = await handle`` and
    ``handle.result(timeout)`` may be used at once, by several consumers, before and after the end.

    Attributes:
        request_id: the request's id.
        prompt_tokens: length of the tokenised prompt.
        cached_tokens: prompt tokens found in the prefix cache; set by the engine at admission.
        predicted_ttft: predicted seconds from submit to the first token; None when unknown; set by
            the engine at admission.
        prompt_logprobs: what was asked for of the prompt's tokens; there before the first token is.

    Thread: every method may be called from any thread; producers: one at a time.
    """

    __slots__ = (
        "_cancel", "_completion", "_end_wakers", "_error", "_hold", "_is_done", "_lock",
        "_timings", "_token_wakers", "_tokens", "cached_tokens", "predicted_ttft",
        "prompt_logprobs", "prompt_tokens", "request_id",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_tokens: int,
        on_cancel: Callable[[], None] | None = None,
        on_hold: Callable[[bool], None] | None = None,
    ) -> None:
        """Make the handle of a request that is about to be queued.

        Args:
            request_id: shown to the user.
            prompt_tokens: length of the tokenised prompt.
            on_cancel: called at most once, in the thread that cancels, with no lock of the handle
                held. It may come just after the terminal event and must bear that.
            on_hold: called with True to hold and False to resume, under the same rules, but as
                often as the user does.
        """
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.predicted_ttft: float | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        self._cancel, self._hold = on_cancel, on_hold
        self._lock = threading.RLock()
        self._tokens: list[Token] = []
        self._is_done = False
        self._completion: Completion | None = None
        self._error: FlowPrefillError | None = None
        self._timings: Timings | None = None
        # Made only when a client waits: there may be 10,000 handles that no client waits for.
        self._token_wakers: list[Waker] | None = None
        self._end_wakers: list[Waker] | None = None

    def __repr__(self) -> str:
        """Show the id, how far it is, and how it ended."""
        if self._error is not None:
            state = f"failed: {self._error.code}"
        elif self._completion is not None:
            state = f"ended: {self._completion.finish_reason}"
        else:
            state = "going on"
        return f"<Handle {self.request_id}, {len(self._tokens)} tokens, {state}>"

    # --- the engine's side -------------------------------------------------------------------

    def push(self, token: Token) -> None:
        """Hand over the next token. AssertionError after the end (a bug of ours)."""
        wake(self.append(token))

    def append(self, token: Token) -> Sequence[Waker]:
        """Do as `push`, but leave the waking to the caller: it may hold a lock now."""
        with self._lock:
            self._check_open("push")
            self._tokens.append(token)
            wakers, self._token_wakers = self._token_wakers, None
        return wakers or ()

    def finish(self, completion: Completion) -> None:
        """End the request with a result. AssertionError if it has ended (a bug of ours)."""
        self._end("finish", completion, None, completion.timings)

    def fail(self, error: FlowPrefillError, timings: Timings | None = None) -> None:
        """End the request with an error. AssertionError if it has ended (a bug of ours)."""
        self._end("fail", None, error, timings)

    # --- the user's side ---------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether the terminal event has come."""
        return self._is_done

    @property
    def output_tokens(self) -> int:
        """How many tokens have been generated so far."""
        return len(self._tokens)

    @property
    def timings(self) -> Timings | None:
        """Where the time went; None before the end."""
        return self._timings

    def cancel(self) -> None:
        """Ask the engine to end the request at the next boundary; does not wait for it.

        Calling it again, or after the end, does nothing.
        """
        with self._lock:
            cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()

    def hold(self) -> None:
        """Have no more tokens made until `resume`, since no client takes them.

        A decode step that has begun still brings its token, and a prefill goes on to the first one.
        The KV cache stays, unless others need the memory; what is lost so is computed again after
        `resume`. The time for which it is held counts neither in `Timings.mean_itl` nor against its
        TPOT. A held request makes no end, so who waits for it waits on: resume or cancel it.
        Closing the engine resumes it. Holding twice, or after the end, does nothing.

        Thread: any, as `cancel`; takes the engine's lock for one decision, waits for no step. Of
        threads that hold and resume at once the last one wins.
        """
        hold = self._hold
        if hold is not None:
            hold(True)

    def resume(self) -> None:
        """Have tokens made again; does nothing unless the request is held. Thread: as `hold`."""
        hold = self._hold
        if hold is not None:
            hold(False)

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end and return the completion. Not for use inside an asyncio loop.

        Args:
            timeout: longest wait, seconds; None or inf: for ever. The request goes on after it.

        Raises:
            TimeoutError: the request has not ended in time.
            FlowPrefillError: what ended the request.
        """
        if not self._block(None, timeout):
            message = f"request {self.request_id} has not ended within {timeout:g} s"
            raise TimeoutError(message)
        return self._outcome()

    def __iter__(self) -> Iterator[Token]:
        """Yield every token from the first on, blocking; then stop or raise what ended it."""
        position = 0
        while True:
            self._block(position, None)
            if position >= len(self._tokens):
                break
            yield self._tokens[position]
            position += 1
        self._outcome_or_raise()

    def __aiter__(self) -> AsyncIterator[Token]:
        """Yield every token from the first on; then stop or raise what ended the request."""
        return _TokenStream(self)

    def __await__(self) -> Generator[Any, None, Completion]:
        """Wait for the end. Cancelling the waiting task leaves the request running."""
        return self._wait_end().__await__()

    # --- waiting -----------------------------------------------------------------------------

    async def _wait_end(self) -> Completion:
        await self._suspend(None)
        return self._outcome()

    async def _next_token(self, position: int) -> Token | None:
        """Return the token at `position`; None when the request ended well before it."""
        await self._suspend(position)
        if position < len(self._tokens):
            return self._tokens[position]
        self._outcome_or_raise()
        return None

    def _block(self, position: int | None, timeout: float | None) -> bool:
        """Block the thread until there is a token at `position` (None: the end), or the end."""
        if self._is_ready(position):
            return True
        event = threading.Event()
        if not self._register(position, event.set):
            return True
        try:
            return event.wait(waited_at_most(timeout))
        finally:
            if not event.is_set():
                self._unregister(event.set)

    async def _suspend(self, position: int | None) -> None:
        """Suspend the task until there is a token at `position` (None: the end), or the end."""
        if self._is_ready(position):
            return
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def waker() -> None:
            try:
                loop.call_soon_threadsafe(_resolve, future)
            except RuntimeError:  # the loop was closed: no task waits there any more
                if not loop.is_closed():
                    raise

        if not self._register(position, waker):
            return
        try:
            await future
        finally:
            if future.cancelled() or not future.done():
                self._unregister(waker)

    def _is_ready(self, position: int | None) -> bool:
        return self._is_done or (position is not None and position < len(self._tokens))

    def _register(self, position: int | None, waker: Waker) -> bool:
        """Leave a waker; False if there is nothing to wait for. Under the lock: none is lost.

        It looks once more behind that: what interrupts it may have taken the wakers before.
        """
        with self._lock:
            if self._is_ready(position):
                return False
            if position is None:
                self._end_wakers = [*(self._end_wakers or ()), waker]
            else:
                self._token_wakers = [*(self._token_wakers or ()), waker]
            return not self._is_ready(position)

    def _unregister(self, waker: Waker) -> None:
        with self._lock:
            for wakers in (self._token_wakers, self._end_wakers):
                if wakers and waker in wakers:
                    wakers.remove(waker)

    # --- the end -----------------------------------------------------------------------------

    def _end(
        self,
        call: str,
        completion: Completion | None,
        error: FlowPrefillError | None,
        timings: Timings | None,
    ) -> None:
        with self._lock:
            self._check_open(call)
            self._completion, self._error, self._timings = completion, error, timings
            self._cancel = self._hold = None  # also drops what the callback refers to
            self._is_done = True
            wakers = [*(self._token_wakers or ()), *(self._end_wakers or ())]
            self._token_wakers = self._end_wakers = None
        wake(wakers)

    def _check_open(self, call: str) -> None:
        if self._is_done:
            message = f"request {self.request_id}: {call}() after its terminal event"
            raise AssertionError(message)

    def _outcome_or_raise(self) -> None:
        if self._error is not None:
            # Without its old traceback: else one raised to many consumers would grow each time.
            raise self._error.with_traceback(None)

    def _outcome(self) -> Completion:
        self._outcome_or_raise()
        assert self._completion is not None
        return self._completion


class _TokenStream:
    """One asyncio consumer's position; a cancelled wait leaves the position where it was."""

    __slots__ = ("_handle", "_position")

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._position = 0

    def __aiter__(self) -> _TokenStream:
        return self

    async def __anext__(self) -> Token:
        while True:
            position = self._position
            token = await self._handle._next_token(position)
            if token is None:
                raise StopAsyncIteration
            if position == self._position:  # else a task that shares this iterator has taken it
                self._position += 1
                return token


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def waited_at_most(timeout: float | None) -> float | None:
    """Return a timeout that locks can wait for; None: for ever, which inf and centuries come to."""
    return None if timeout is None or timeout > threading.TIMEOUT_MAX else timeout


def wake(wakers: Iterable[Waker]) -> None:
    """Call the wakers, no lock held."""
    for waker in wakers:
        waker()
