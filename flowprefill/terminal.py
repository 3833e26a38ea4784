"""The standard streams and signals of a command, as they were when it started; cli.py calls it.

A stream may be closed, may have an encoding without the characters of a text, or may have lost its
reader.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

TERMINATED = 128  # plus the signal's number: the exit status as a shell shows it


def prepare_streams() -> None:
    """Make the standard streams usable: a closed one is empty, and any text can be written.

    What an encoding does not have is written as an escape, ``\\xe9``.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            nothing = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, nothing)
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Say nothing more on stdout, nor when the interpreter flushes it once more at its end."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def finish_output() -> None:
    """Write what is left for stdout, after an error that may be its own, e.g. a full disk's."""
    try:
        sys.stdout.flush()
    except OSError:
        drop_output()


@contextmanager
def unwinding_signals() -> Iterator[None]:
    """For what must be ended or removed: SIGTERM and SIGHUP leave the block as an exception."""

    def leave(number: int, _frame: object) -> NoReturn:
        raise SystemExit(TERMINATED + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) == signal.SIG_DFL  # nohup ignores one: so do we
    ]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
