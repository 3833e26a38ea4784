"""GrammarProcess: compiles a client's grammar first in a process that can be ended; by Grammars.

A few bytes of JSON schema can cost minutes (a large ``multipleOf``) or gigabytes. The process is
started with the first grammar, kept, and replaced when it had to be ended.
"""

from __future__ import annotations

import os
from pathlib import Path

from flowprefill.engine.interruptible_lock import InterruptibleLock, do_elsewhere
from flowprefill.models.bounded_process import BoundedProcess, ProcessEnded

WORKER = Path(__file__).with_name("grammar_worker.py")
CPU_LIMIT_S = 1
MEMORY_LIMIT_BYTES = 1 << 29


class GrammarProcess:
    """One process, one grammar at a time; any thread may ask, and waits for those before it."""

    def __init__(self) -> None:
        self._lock = InterruptibleLock()
        self._process: BoundedProcess | None = None
        self._owner = 0

    def can_compile(self, grammar: str) -> bool:
        """Whether compiling a grammar ends in time and within the memory, well or with an error.

        Raises:
            ProcessNotStarted: none is there to compile it.

        Cost: a millisecond or two; 0.1 s more for the first; at most CPU_LIMIT_S of computing.
        """
        with self._lock:
            try:
                self._alive().ask(grammar.encode())
            except ProcessEnded:
                self._end()
                return False
            except BaseException:
                self._end()
                raise
            return True

    def close(self) -> None:
        """End the process, if there is one."""
        if self._lock.is_inside:
            do_elsewhere(self.close)
            return
        with self._lock:
            self._end()

    def _alive(self) -> BoundedProcess:
        if self._process is not None and self._owner != os.getpid():  # we are a fork
            self._process.forget()
            self._process = None
        if self._process is not None and not self._process.is_alive:
            self._end()
        if self._process is None:
            self._owner = os.getpid()
            self._process = BoundedProcess(
                str(WORKER), cpu_limit_s=CPU_LIMIT_S, memory_limit_bytes=MEMORY_LIMIT_BYTES
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.end()
