"""GrammarProcess: compiles a client's grammar first in a process that can be ended; by Grammars.

A few bytes of JSON schema can cost minutes (a large ``multipleOf``) or gigabytes, and a thread that
compiles cannot be stopped. The process has limits on its time and memory; it is started with the
first grammar, kept, and replaced when it had to be ended.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

WORKER = Path(__file__).with_name("grammar_worker.py")
# In addition to the limit on the process's CPU time: for a machine that gives it none.
WALL_LIMIT_S = 30.0
READ_BYTES = 1 << 16


class GrammarProcess:
    """One process, one grammar at a time; any thread may ask, and waits for those before it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def can_compile(self, grammar: str) -> bool:
        """Whether compiling a grammar ends in time and within the memory, well or with an error.

        Cost: a millisecond or two; 0.1 s more for the first; at most the worker's CPU limit.
        """
        with self._lock:
            process = self._alive()
            try:
                reply = _ask(process, json.dumps(grammar).encode() + b"\n")
            except OSError:
                reply = b""
            if not reply:
                self._end()
            return bool(reply)

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def _alive(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # none yet, or we are a fork: the process is the parent's
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self._end()
            paths = os.pathsep.join(path for path in sys.path if path)
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,  # a Ctrl-C is for us, not for it
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # what it had not read is of no use any more
                    continue


def _ask(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """Send one line and wait for one; empty if the process has ended or takes too long."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(request)
    process.stdin.flush()
    reply, until = b"", time.monotonic() + WALL_LIMIT_S
    while not reply.endswith(b"\n"):
        left = until - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            return b""
        part = os.read(process.stdout.fileno(), READ_BYTES)
        if not part:
            return b""
        reply += part
    return reply
