"""TemplateProcesses: chat templates rendered by small processes that can be ended; by ChatTemplate.

A template is a program that comes with a checkpoint, over data that comes from a client. jinja2's
sandbox keeps it from files and attributes, not from computing: nested loops, ``'x' * 10**10`` or
``9 ** (9 ** 9)`` (which even compiling works out). Within our process nothing stops that: a thread
cannot be killed, and such an operation of Python's C code never looks at a request to stop. A
process can be killed, whatever it does. A short chat takes 0.05 ms that way instead of 0.01, one of
40 KB 0.2 ms. A process (15 MB, no torch) is up in 0.1 s, is started with the first chat unless
warm() did, kept, and replaced when it had to be ended.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from flowprefill.errors import InvalidRequest
from flowprefill.models import template_worker
from flowprefill.models.template_worker import CPU_LIMIT_S, LENGTH_BYTES

MOST_PROCESSES = 2
# In addition to the limit on the process's CPU time: for a machine that gives it none.
WALL_LIMIT_S = 30.0


class _Ended(Exception):
    """The process is gone, or had to be ended; says why."""


class _Process:
    """One process; one thread at a time."""

    def __init__(self) -> None:
        """Start it; it is ready to be asked at once, and answers when it is up."""
        self._socket, theirs = socket.socketpair()
        # Our module path, so that it finds the same jinja2; -S and -P: nothing else is imported.
        paths = os.pathsep.join(path for path in sys.path if path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-P", template_worker.__file__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,  # a Ctrl-C is for us, not for it
            )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes) -> bytes:
        """Send a request and wait for its reply; raises _Ended."""
        until = time.monotonic() + WALL_LIMIT_S
        try:
            self._socket.settimeout(WALL_LIMIT_S)
            self._socket.sendall(len(request).to_bytes(LENGTH_BYTES) + request)
            return self._receive(int.from_bytes(self._receive(LENGTH_BYTES, until)), until)
        except TimeoutError:
            raise _Ended(f"ran longer than {WALL_LIMIT_S:g} s") from None
        except OSError:
            raise _Ended(self._why()) from None

    def _receive(self, size: int, until: float) -> bytes:
        received = bytearray()
        while len(received) < size:
            self._socket.settimeout(max(until - time.monotonic(), 1e-3))
            part = self._socket.recv(min(size - len(received), 1 << 20))
            if not part:
                raise _Ended(self._why())
            received += part
        return bytes(received)

    def _why(self) -> str:
        """Say how it ended, once its socket is closed."""
        try:
            status = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            status = 0
        if status == -signal.SIGXCPU:
            return f"computed longer than {CPU_LIMIT_S} s"
        return f"ended its process (status {status})"

    def end(self) -> None:
        """Kill it."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def forget(self) -> None:
        """Let go of it in a forked child: it is the parent's."""
        self._socket.close()
        self._process.returncode = 0


class TemplateProcesses:
    """A few processes, started when needed; any thread."""

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(MOST_PROCESSES)
        self._idle: list[_Process] = []  # append and pop are atomic

    def render(self, template: str, variables: Mapping[str, Any], max_chars: int) -> str:
        """Render a template.

        Args:
            template: jinja2 source; each process keeps the last few compiled.
            variables: what JSON can carry; other mappings and sequences become plain ones.
            max_chars: most that it may write.

        Raises:
            InvalidRequest: the template is broken, refuses the messages, fails, or takes too long,
                too much memory or too much room; or a variable is not of JSON's types.
        """
        request = {"template": template, "variables": variables, "max_chars": max_chars}
        try:
            raw = json.dumps(request, default=_as_json).encode()
        except (TypeError, ValueError, RecursionError) as error:
            message = f"chat_template_kwargs: not what JSON can carry: {error}"
            raise InvalidRequest(message, param="chat_template_kwargs") from None
        try:
            reply = json.loads(self._ask(raw))
        except _Ended as error:
            message = f"messages: the chat template {error} on them and was stopped"
            raise InvalidRequest(message, param="messages") from None
        if "text" in reply:
            return str(reply["text"])
        raise InvalidRequest(f"messages: {reply['refused']}", param="messages")

    def warm(self) -> None:
        """Start a process now, so that the first chat does not wait for it."""
        if not self._idle:
            self._idle.append(_Process())

    def _ask(self, request: bytes) -> bytes:
        with self._free:
            process = self._take()
            try:
                reply = process.ask(request)
            except BaseException:
                process.end()
                raise
            self._idle.append(process)
            return reply

    def _take(self) -> _Process:
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                return process
            process.end()
        return _Process()

    def close(self) -> None:
        """End all idle processes; those in use end when their callers are done."""
        while self._idle:
            self._idle.pop().end()

    def forget(self) -> None:
        """Start afresh in a forked child."""
        while self._idle:
            self._idle.pop().forget()
        self._free = threading.BoundedSemaphore(MOST_PROCESSES)


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "__iter__"):
        return list(value)
    raise TypeError(f"got {type(value).__name__}, expected text, numbers, lists or objects")


# One set for the process: models share them, and they have nothing that would have to be closed
# with a model.
PROCESSES = TemplateProcesses()
atexit.register(PROCESSES.close)
os.register_at_fork(after_in_child=PROCESSES.forget)
