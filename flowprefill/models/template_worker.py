"""Renders chat templates in a process of its own; template_process.py starts it as a script.

It imports jinja2 and the standard library alone, so it is up in a tenth of a second. Requests and
replies are frames on the socket that is its standard input: eight bytes of length, then JSON.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import math
import resource
import socket
import sys
import time
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LENGTH_BYTES = 8
# What one rendering may take; a template that repeats a text or a loop without end meets these.
CPU_LIMIT_S = 2
MEMORY_LIMIT_BYTES = 1 << 30
MAX_MESSAGE_CHARS = 300


class _GenerationTag(Extension):
    """``{% generation %}`` blocks mark assistant text for training; here they are plain."""

    tags = {"generation"}  # noqa: RUF012 - declared so by the base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateRefused(jinja2.TemplateError):
    """The template itself refused the messages (``raise_exception``)."""


def _raise_exception(message: str) -> None:
    raise TemplateRefused(message)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    # jinja2's own filter escapes for HTML, which would change what the model reads.
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _strftime_now(pattern: str) -> str:
    return dt.datetime.now().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    return _environment().from_string(text)


def _said(error: BaseException) -> str:
    try:
        return str(error)[:MAX_MESSAGE_CHARS]
    except Exception:  # its text is the template's, too
        return "an error without a text"


def render(text: str, variables: dict[str, Any], max_chars: int) -> dict[str, str]:
    """Render a template; returns ``{"text": …}``, or ``{"refused": why}``."""
    try:
        template = _compiled(text)
    except jinja2.TemplateSyntaxError as error:
        where = f"line {error.lineno}: {_said(error)}"
        return {"refused": f"the model's chat template is broken: {where}"}
    except Exception as error:  # Python's own compiler refuses what jinja2 made of it
        kind = type(error).__name__
        return {"refused": f"the model's chat template is broken: {kind}: {_said(error)}"}
    pieces: list[str] = []
    left = max_chars
    try:
        for piece in template.generate(variables):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                return {"refused": f"the chat template writes more than {max_chars} characters"}
        return {"text": "".join(pieces)}
    except jinja2.TemplateError as error:
        return {"refused": f"the chat template says: {_said(error)}"}
    except Exception as error:  # a template can raise anything Python can
        return {"refused": f"the chat template failed with {type(error).__name__}: {_said(error)}"}


def _answer(raw: bytes) -> dict[str, str]:
    try:
        request = json.loads(raw)
    except RecursionError:
        return {"refused": "what the chat template gets is nested too deeply"}
    return render(request["template"], request["variables"], request["max_chars"])


def _limit_cpu() -> None:
    """Have the system end this process if the next rendering computes for too long."""
    most = math.ceil(time.process_time() + CPU_LIMIT_S)
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def serve(connection: socket.socket) -> None:
    """Answer requests until the other side closes."""
    stream = connection.makefile("rwb")
    while len(head := stream.read(LENGTH_BYTES)) == LENGTH_BYTES:
        request = stream.read(int.from_bytes(head))
        _limit_cpu()
        raw = json.dumps(_answer(request)).encode()
        stream.write(len(raw).to_bytes(LENGTH_BYTES) + raw)
        stream.flush()


def main() -> None:
    """Set the limits of this process and serve."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    serve(socket.socket(fileno=sys.stdin.fileno()))


if __name__ == "__main__":
    main()
