"""EventThread: sleeps until the executor has news or a set time has come; the core's right hand."""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class EventThread:
    """Calls `on_events` when the event fd is readable and `on_timer` when the timer is due.

    Neither call may be made by anybody else, nor overlap the other. An exception that escapes is
    given to `on_failure`, and the thread goes on.
    """

    def __init__(
        self,
        event_fd: int,
        on_events: Callable[[], None],
        on_timer: Callable[[], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._event_fd = event_fd
        self._on_events = on_events
        self._on_timer = on_timer
        self._on_failure = on_failure
        self._lock = threading.Lock()  # guards the two times
        self._timer_at = math.inf
        self._sleeps_until = -math.inf
        self._is_stopped = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="fp-events", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; not from the thread itself."""
        self._is_stopped = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        os.close(self._wake_fd)

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
            os.eventfd_write(self._wake_fd, 1)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._event_fd, select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        while not self._is_stopped:
            with self._lock:
                self._sleeps_until = self._timer_at
                wait_s = self._timer_at - time.monotonic()
            ready = poll.poll(None if wait_s == math.inf else max(math.ceil(wait_s * 1e3), 0))
            with self._lock:
                self._sleeps_until = -math.inf  # awake: no need to wake it
            try:
                self._handle({fd for fd, _ in ready})
            except Exception as error:
                log.exception("the engine's event thread failed")
                self._on_failure(error)

    def _handle(self, ready: set[int]) -> None:
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        if self._event_fd in ready:
            self._on_events()
        with self._lock:
            is_due = time.monotonic() >= self._timer_at
            if is_due:
                self._timer_at = math.inf
        if is_due:
            self._on_timer()
