"""json_body: a request's body, bounded in coding, size, time and memory; called by handlers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from aiohttp import web

from flowprefill.errors import InvalidRequest
from flowprefill.server.context import SERVER

# Room for what surrounds a prompt, and for requests of many short prompts.
LEAST_BODY_BYTES = 4 << 20
# A token is some 4 bytes of text, or 7 as an id in a JSON list. JSON escapes and languages whose
# tokens are long take a few times more.
BODY_BYTES_PER_TOKEN = 32


class BodyTooLarge(InvalidRequest):
    """The request body is larger than the server reads."""

    status = 413
    code = "body_too_large"


class BodyTooSlow(InvalidRequest):
    """The request body did not come in time."""

    status = 408
    code = "body_timeout"


class UnsupportedCoding(InvalidRequest):
    """The body is compressed: a small one may unpack to any size."""

    status = 415
    code = "unsupported_content_encoding"


@contextlib.asynccontextmanager
async def json_body(request: web.Request) -> AsyncIterator[bytes]:
    """Read a body and count it in while it is used.

    Raises:
        InvalidRequest: the content type is not JSON.
        UnsupportedCoding, BodyTooLarge, BodyTooSlow, TooManyBodies: the rest is not read.
    """
    memory, counted = request.app[SERVER].body_memory, 0
    parts: list[bytes] = []
    try:
        async with contextlib.aclosing(_parts_of(request)) as coming:
            async for part in coming:
                memory.take(len(part))
                counted += len(part)
                parts.append(part)
        body = b"".join(parts)
        parts.clear()
        yield body
    finally:
        memory.give_back(counted)


def body_limit_bytes(request: web.Request) -> int:
    """Return the largest body read: the setting, or what prompts of the model's length need."""
    context = request.app[SERVER]
    if context.options.max_body_mib:
        return int(context.options.max_body_mib * 2**20)
    return max(LEAST_BODY_BYTES, context.engine.max_model_len * BODY_BYTES_PER_TOKEN)


async def _parts_of(request: web.Request) -> AsyncGenerator[bytes, None]:
    """Yield the body as it comes, after checking what it claims to be."""
    _check_headers(request)
    limit = body_limit_bytes(request)
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(limit)
    size = 0
    seconds = request.app[SERVER].options.body_timeout_s
    end_s = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            async with asyncio.timeout_at(end_s):
                part = await request.content.readany()
        except TimeoutError:
            message = f"body: got {size} bytes in {seconds:g} s, expected all of it in that time"
            raise BodyTooSlow(message, param="body") from None
        if not part:
            return
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        yield part


def _check_headers(request: web.Request) -> None:
    coding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("identity", ""):
        raise UnsupportedCoding.field("content-encoding", coding, "identity (an uncompressed body)")
    if "Content-Type" not in request.headers:
        return
    kind = request.content_type
    if kind != "application/json" and not kind.endswith("+json"):
        raise InvalidRequest.field("content-type", kind, "application/json")
    charset = (request.charset or "utf-8").lower()
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise InvalidRequest.field("content-type", f"charset={charset}", "charset=utf-8")


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"body: larger than {round(limit / 2**20, 3):g} MiB", param="body")
