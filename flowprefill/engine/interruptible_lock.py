"""InterruptibleLock: a lock whose holder may be interrupted by code that wants it too.

A signal handler runs in the middle of whatever the main thread does, a finalizer (``__del__``, the
``finally`` of an abandoned generator) where the garbage collector happens to run. Both may cancel
a request or close the engine while their own thread holds the lock. With a plain lock that thread
would wait for itself for ever; so they see that they are inside, and another thread does it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class InterruptibleLock:
    """A lock that can tell whether this thread holds it.

    Attributes:
        inner: the lock itself, for a Condition; taken so, it does not count as held.
    """

    __slots__ = ("_depth", "inner")

    def __init__(self) -> None:
        self.inner = threading.RLock()
        self._depth = 0  # guarded by the inner lock

    def __enter__(self) -> None:
        self.inner.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self.inner.release()

    @property
    def is_inside(self) -> bool:
        """Whether this thread holds it: then it was interrupted, and what it guards is in change.

        An interruption between taking the inner lock and counting it finds nothing in change.
        """
        if not self.inner.acquire(blocking=False):
            return False  # another thread has it
        try:
            return self._depth > 0
        finally:
            self.inner.release()


def do_elsewhere(call: Callable[..., Any], *arguments: Any) -> None:
    """Make a call in a thread of its own, and do not wait for it."""
    threading.Thread(target=call, args=arguments, daemon=True).start()
