"""BoundedProcess: a process with limits, for what input can make endless: templates and grammars.

A thread cannot be killed, and one long operation of C code never looks at a request to stop; a
process can be killed. It has no torch, takes some 15 MB, and is up in 0.1 s.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from flowprefill.errors import ProcessNotStarted
from flowprefill.models import bounded_worker
from flowprefill.models.bounded_worker import LENGTH_BYTES

logger = logging.getLogger(__name__)

# In addition to the limit on the process's CPU time: for a machine that gives it none.
WALL_LIMIT_S = 30.0
MAX_SAID_BYTES = 4000  # of what it writes to its standard error while it starts


class ProcessEnded(Exception):
    """The process is gone, or has to be ended; says why."""


class BoundedProcess:
    """One process; one thread at a time."""

    def __init__(self, worker_file: str, *, cpu_limit_s: int, memory_limit_bytes: int) -> None:
        """Start it; it is ready to be asked at once, and answers when it is up.

        Args:
            worker_file: a Python file with the function that answers; see bounded_worker.py.
            cpu_limit_s: what one answer may compute; the system ends the process after it.
            memory_limit_bytes: of the process's address space.

        Raises:
            ProcessNotStarted: the system gives us none.
        """
        self._cpu_limit_s = cpu_limit_s
        self._is_up = False
        self._name = Path(worker_file).name
        limits = (str(cpu_limit_s), str(memory_limit_bytes))
        # Our module path, so that it finds the same libraries; -S and -P: nothing else is imported.
        # It goes behind the standard library: its first folder is the user's, where a types.py does
        # us no harm (Python has imported its own before) but would end this process at its start.
        paths = [path for path in sys.path if path]
        files = contextlib.ExitStack()
        try:
            # In memory, so that a start that says much waits for no reader.
            self._said = files.enter_context(os.fdopen(os.memfd_create("stderr"), "rb"))
            self._socket, theirs = map(files.enter_context, socket.socketpair())
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-P", bounded_worker.__file__, worker_file, *limits, *paths],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                env={name: os.environ[name] for name in os.environ if name != "PYTHONPATH"},
                start_new_session=True,  # a Ctrl-C is for us, not for it
            )
        except OSError as error:
            files.close()
            raise self._not_started(str(error), "") from None
        theirs.close()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes) -> bytes:
        """Send a request and wait for its reply.

        Raises:
            ProcessEnded: no reply came; the process is of no further use.
            ProcessNotStarted: so it is, before it read the request.
        """
        if not self._is_up:
            self._wait_until_up()
        until = time.monotonic() + WALL_LIMIT_S
        try:
            self._socket.settimeout(WALL_LIMIT_S)
            self._socket.sendall(len(request).to_bytes(LENGTH_BYTES) + request)
            return self._receive(int.from_bytes(self._receive(LENGTH_BYTES, until)), until)
        except TimeoutError:
            raise ProcessEnded(f"ran longer than {WALL_LIMIT_S:g} s") from None
        except OSError:
            raise ProcessEnded(self._why()) from None

    def _wait_until_up(self) -> None:
        """Wait for the empty frame by which it says that its worker is loaded."""
        try:
            self._receive(LENGTH_BYTES, time.monotonic() + WALL_LIMIT_S)
        except TimeoutError:
            raise self._not_started(f"is not up after {WALL_LIMIT_S:g} s", self._stderr()) from None
        except (OSError, ProcessEnded):
            raise self._not_started(self._why(), self._stderr()) from None
        self._is_up = True
        self._said.close()

    def _stderr(self) -> str:
        size = os.fstat(self._said.fileno()).st_size
        said = os.pread(self._said.fileno(), MAX_SAID_BYTES, max(size - MAX_SAID_BYTES, 0))
        return said.decode("utf-8", "replace").strip()

    def _not_started(self, why: str, said: str) -> ProcessNotStarted:
        """Log why it is not up, and return the error that clients see."""
        logger.error(
            "the process of %s does not start: %s%s", self._name, why, said and f"\n{said}"
        )
        return ProcessNotStarted(
            "a process that the server needs for this does not start; its log says why"
        )

    def _receive(self, size: int, until: float) -> bytes:
        received = bytearray()
        while len(received) < size:
            self._socket.settimeout(max(until - time.monotonic(), 1e-3))
            part = self._socket.recv(min(size - len(received), 1 << 20))
            if not part:
                raise ProcessEnded(self._why())
            received += part
        return bytes(received)

    def _why(self) -> str:
        """Say how it ended, once its socket is closed."""
        try:
            status = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            status = 0
        if status == -signal.SIGXCPU:
            return f"computed longer than {self._cpu_limit_s} s"
        return f"ended its process (status {status})"

    def end(self) -> None:
        """Kill it."""
        self._socket.close()
        self._said.close()
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Let go of it in a forked child: it is the parent's."""
        self._socket.close()
        self._said.close()
        self._process.returncode = 0
