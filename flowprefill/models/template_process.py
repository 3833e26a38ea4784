"""TemplateProcesses: chat templates rendered by processes that can be ended; by ChatTemplate.

A template is a program that comes with a checkpoint, over data that comes from a client. jinja2's
sandbox keeps it from files and attributes, not from computing: nested loops, ``'x' * 10**10`` or
``9 ** (9 ** 9)`` (which even compiling works out). A short chat takes 0.05 ms this way instead of
0.01, one of 40 KB 0.2 ms. A process is started with the first chat unless warm() did, kept, and
replaced when it had to be ended.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import threading
from collections.abc import Mapping
from typing import Any

from flowprefill.errors import InvalidRequest, ProcessNotStarted
from flowprefill.models import template_worker
from flowprefill.models.bounded_process import BoundedProcess, ProcessEnded

# One of them is left to short chats: long ones would hold them up for as long as one may compute.
MOST_PROCESSES, MOST_FOR_LONG = 3, 2
LONG_BYTES = 16 * 1024
# What one rendering may take; a template that repeats a text or a loop without end meets these.
CPU_LIMIT_S = 2
MEMORY_LIMIT_BYTES = 1 << 30


def start_process() -> BoundedProcess:
    """Start one; it can be asked at once."""
    return BoundedProcess(
        template_worker.__file__, cpu_limit_s=CPU_LIMIT_S, memory_limit_bytes=MEMORY_LIMIT_BYTES
    )


class TemplateProcesses:
    """A few processes, started when needed; any thread."""

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(MOST_PROCESSES)
        self._free_for_long = threading.BoundedSemaphore(MOST_FOR_LONG)
        self._idle: list[BoundedProcess] = []  # append and pop are atomic

    def render(self, template: str, variables: Mapping[str, Any], max_chars: int) -> str:
        """Render a template.

        Args:
            template: jinja2 source; each process keeps the last few compiled.
            variables: what JSON can carry; other mappings and sequences become plain ones.
            max_chars: most that it may write.

        Raises:
            InvalidRequest: the template is broken, refuses the messages, fails, or takes too long,
                too much memory or too much room; or a variable is not of JSON's types.
            ProcessNotStarted: none is there to render it.
        """
        request = {"template": template, "variables": variables, "max_chars": max_chars}
        try:
            raw = json.dumps(request, default=_as_json).encode()
        except (TypeError, ValueError, RecursionError) as error:
            message = f"chat_template_kwargs: not what JSON can carry: {error}"
            raise InvalidRequest(message, param="chat_template_kwargs") from None
        try:
            is_long = len(raw) > LONG_BYTES + len(template)
            reply = json.loads(self._ask(raw, is_long=is_long))
        except ProcessEnded as error:
            message = f"messages: the chat template {error} on them and was stopped"
            raise InvalidRequest(message, param="messages") from None
        if "text" in reply:
            return str(reply["text"])
        raise InvalidRequest(f"messages: {reply['refused']}", param="messages")

    def fault_of(self, template: str) -> str:
        """Return where a template does not compile; empty: it does, or no process says."""
        request = {"template": template, "variables": {"messages": []}, "max_chars": 0}
        with contextlib.suppress(ProcessEnded, ProcessNotStarted):
            reply = json.loads(self._ask(json.dumps(request).encode(), is_long=False))
            return str(reply.get("broken", ""))
        return ""

    def warm(self) -> None:
        """Start a process now, so that the first chat does not wait for it."""
        if not self._idle:
            with contextlib.suppress(ProcessNotStarted):  # it is in the log; chats are told
                self._idle.append(start_process())

    def _ask(self, request: bytes, *, is_long: bool) -> bytes:
        with self._free_for_long if is_long else contextlib.nullcontext(), self._free:
            process = self._take()
            try:
                reply = process.ask(request)
            except BaseException:
                process.end()
                raise
            self._idle.append(process)
            return reply

    def _take(self) -> BoundedProcess:
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                return process
            process.end()
        return start_process()

    def close(self) -> None:
        """End all idle processes; those in use end when their callers are done."""
        while self._idle:
            self._idle.pop().end()

    def forget(self) -> None:
        """Start afresh in a forked child."""
        while self._idle:
            self._idle.pop().forget()
        self._free = threading.BoundedSemaphore(MOST_PROCESSES)
        self._free_for_long = threading.BoundedSemaphore(MOST_FOR_LONG)


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
