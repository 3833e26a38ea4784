"""EventThread: waits for the worker's events or a set time, and has the core handle them."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from flowprefill.errors import no_threads

if TYPE_CHECKING:
    from flowprefill.engine.worker import RunEvent, Worker

log = logging.getLogger(__name__)


class EventThread:
    """Calls `on_event` with each of the worker's events and `on_timer` when the timer is due.

    Both are called from one thread. An exception that escapes is given to `on_failure`, and the
    thread goes on.
    """

    def __init__(
        self,
        worker: Worker,
        on_event: Callable[[RunEvent], None],
        on_timer: Callable[[], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._worker = worker
        self._on_event = on_event
        self._on_timer = on_timer
        self._on_failure = on_failure
        self._lock = threading.Lock()  # guards the two times
        self._timer_at = math.inf
        self._sleeps_until = -math.inf
        self._is_stopped = False
        self._thread = threading.Thread(target=self._serve, name="fp-events", daemon=True)

    def start(self) -> None:
        """Start the thread; raises ConfigError if the system starts no more."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise no_threads("one more", error) from None

    def stop(self) -> None:
        """End the thread and wait for it; not from the thread itself."""
        self._is_stopped = True
        self._worker.wake()
        self._thread.join()

    @property
    def is_current(self) -> bool:
        """Whether the calling thread is this one."""
        return threading.current_thread() is self._thread

    def set_timer(self, at: float) -> None:
        """Have `on_timer` called at this time instead of the one set before; inf: not at all.

        Thread: any. Wakes the thread only if it would sleep too long.
        """
        with self._lock:
            self._timer_at = at
            sleeps_too_long = at < self._sleeps_until
            if sleeps_too_long:
                self._sleeps_until = at
        if sleeps_too_long:
            self._worker.wake()

    def step(self) -> None:
        """Wait once and handle what has come; a simulator calls this instead of `start`."""
        with self._lock:
            self._sleeps_until = until_s = self._timer_at
        events = self._worker.poll(until_s)
        with self._lock:
            self._sleeps_until = -math.inf  # awake: no need to wake it
        for event in events:
            self._on_event(event)
        now = self._worker.now_s()  # before the lock: in no call may the garbage collector run
        with self._lock:
            is_due = now >= self._timer_at
            if is_due:
                self._timer_at = math.inf
        if is_due:
            self._on_timer()

    def _serve(self) -> None:
        while not self._is_stopped:
            try:
                self.step()
            except Exception as error:
                log.exception("the engine's event thread failed")
                self._on_failure(error)
