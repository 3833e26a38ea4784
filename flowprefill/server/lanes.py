"""Lanes: threads for what would hold the event loop; handlers have their work done by them.

Each kind of work has threads of its own, so that slow work of one kind keeps no other waiting: a
short chat is rendered at once while long prompts are tokenised or grammars compiled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Lane(StrEnum):
    """A kind of work."""

    SHORT = "short"  # milliseconds: chats and texts of a few thousand tokens
    LONG = "long"  # up to some tenths of a second
    HUGE = "huge"  # up to seconds: most of it is refused at last, for it fits no model
    GRAMMARS = "grammars"  # compiling them, up to a second or two each
    REPLIES = "replies"  # writing long ones


# Few: such work mostly holds the GIL, or takes a core from the model. Made when first needed.
THREADS = {
    Lane.SHORT: 4, Lane.LONG: 2, Lane.HUGE: 2, Lane.GRAMMARS: 2, Lane.REPLIES: 2
}  # fmt: skip
# Of text, or of a body. A thousand characters take a millisecond, with all that is done to them.
SHORT_CHARS, LONG_CHARS = 16 * 1024, 256 * 1024


def lane_of(chars: int) -> Lane:
    """Return where a text of so many characters is worked on."""
    if chars <= SHORT_CHARS:
        return Lane.SHORT
    return Lane.LONG if chars <= LONG_CHARS else Lane.HUGE


class Lanes:
    """The threads of one server; used from its event loop.

    Not asyncio's own pool: requests that keep it busy would hold up the shutdown, which needs a
    thread too.
    """

    def __init__(self) -> None:
        self._pools = {lane: ThreadPoolExecutor(n, f"fp-{lane}") for lane, n in THREADS.items()}

    async def run(
        self,
        lane: Lane,
        work: Callable[..., T],
        *args: Any,
        undo: Callable[[T], object] | None = None,
    ) -> T:
        """Do work in a lane's thread.

        If the task is cancelled, work that still waits is let go of at once: a body must not stay
        in memory until its turn. What it has begun, it ends.

        Args:
            undo: called with the result that came after the task was cancelled; any thread.
        """
        waiting = [partial(work, *args)]

        def run() -> T:
            do = waiting.pop()
            return do()

        done = self._pools[lane].submit(run)
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            if undo is not None:
                done.add_done_callback(partial(_undo, undo))
            raise
        finally:
            waiting.clear()

    def end(self) -> None:
        """Take no more work; do not wait for what runs."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)


def _undo(undo: Callable[[T], object], done: Future[T]) -> None:
    if not done.cancelled() and done.exception() is None:
        undo(done.result())
