"""The application and its life: routes, start, graceful shutdown; the CLI calls serve()."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import web

from flowprefill.errors import ConfigError
from flowprefill.server.context import SERVER, ServerContext
from flowprefill.server.engine_protocol import ServedEngine
from flowprefill.server.http.access_log import access_log_middleware
from flowprefill.server.http.connections import (
    CLOSING_WRITE_S,
    ConnectionTable,
    connection_factory,
    raise_file_limit,
)
from flowprefill.server.http.cors import add_cors_headers, cors_middleware
from flowprefill.server.http.error_middleware import error_middleware
from flowprefill.server.http.guard import Guard, guarding
from flowprefill.server.http.tls import tls_context
from flowprefill.server.observe import debug_routes, page_routes
from flowprefill.server.observe.metrics import ServerMetrics
from flowprefill.server.observe.open_telemetry import open_telemetry
from flowprefill.server.observe.telemetry import TELEMETRY, telemetry_middleware
from flowprefill.server.openai import models_routes, tokens_routes
from flowprefill.server.openai.chat import chat_completions
from flowprefill.server.openai.completions import completions
from flowprefill.server.openai.embeddings import embeddings
from flowprefill.server.openapi.document import openapi
from flowprefill.server.options import ServerOptions
from flowprefill.server.responses.responses import delete_response, get_response, responses

logger = logging.getLogger(__name__)

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# After every request has ended or is cancelled, handlers need this long at most to say so.
HANDLER_END_S = 5.0
BACKLOG = 1024  # connections that the system keeps until we accept them


async def _metrics(request: web.Request) -> web.Response:
    body = request.app[SERVER].metrics.render()
    return web.Response(body=body, headers={"Content-Type": METRICS_CONTENT_TYPE})


def create_app(
    engine: ServedEngine | None, options: ServerOptions | None = None
) -> web.Application:
    """Build the application.

    Args:
        engine: None while the model loads; ``app[SERVER].attach(engine)`` follows.
        options: settings; their defaults when None.

    Run it with ``handler_cancellation=True`` (as serve() does): without it aiohttp does not tell
    handlers that their client has gone, and their prompts would be computed for nothing.
    """
    options = options or ServerOptions()
    logs = [access_log_middleware] if options.log_requests else []
    telemetry = open_telemetry(options)
    spans = [] if telemetry is None else [telemetry_middleware]
    guard = Guard(options.allowed_hosts, options.allowed_origins)
    app = web.Application(
        middlewares=[*logs, *spans, error_middleware, guarding(guard), cors_middleware]
    )
    app.on_response_prepare.append(add_cors_headers)
    metrics = ServerMetrics(vllm_names=options.vllm_metrics)
    app[SERVER] = ServerContext(engine, options, metrics, ConnectionTable(options), guard)
    if telemetry is not None:
        app[TELEMETRY] = telemetry
        app[SERVER].on_attach(telemetry)
    app.add_routes(
        [
            web.post("/v1/completions", completions),
            web.post("/v1/chat/completions", chat_completions),
            web.post("/v1/responses", responses),
            web.get("/v1/responses/{id}", get_response),
            web.delete("/v1/responses/{id}", delete_response),
            web.post("/v1/embeddings", embeddings),
            web.get("/v1/models", models_routes.list_models),
            web.get("/v1/models/{id:.+}", models_routes.get_model),
            web.get("/health", models_routes.health),
            web.get("/health/ready", models_routes.ready),
            web.get("/ready", models_routes.ready),
            web.get("/version", models_routes.version),
            web.get("/load", models_routes.load),
            web.get("/server_info", models_routes.server_info),
            web.get("/metrics", _metrics),
            web.get("/openapi.json", openapi),
            web.post("/tokenize", tokens_routes.tokenize),
            web.post("/detokenize", tokens_routes.detokenize),
        ]
    )
    if options.page:
        app.router.add_get("/", page_routes.page_handler())
        app.router.add_get("/live", page_routes.live)
    app.router.add_get("/debug/timeline", debug_routes.timeline)
    app.router.add_get("/debug/decisions", debug_routes.decisions)
    app.router.add_get("/debug/requests", debug_routes.requests)
    app.router.add_get("/debug/requests/{id:.+}", debug_routes.one_request)
    return app


class Server:
    """One listening server; all methods run on its event loop."""

    def __init__(self, engine: ServedEngine | None, options: ServerOptions | None = None) -> None:
        """Read the certificates; `start` listens. Raises ConfigError where a file is wrong."""
        self.tls = tls_context(options or ServerOptions())
        self.app = create_app(engine, options)
        self.context = self.app[SERVER]
        # What still runs when it is cleaned up waits for a body or a thread, and no client gets it.
        self._runner = web.AppRunner(
            self.app, handler_cancellation=True, shutdown_timeout=CLOSING_WRITE_S
        )
        self._listening: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which the system chooses for port 0.

        Raises:
            ConfigError: there is no such host.
            OSError: the address is taken or not ours.
        """
        if not host:  # to the system it means all addresses, and a variable may be unset
            allowed = "an address, '0.0.0.0' or '::' for all"
            raise ConfigError(f"host: got '', expected {allowed}", param="host")
        await self._runner.setup()
        assert self._runner.server is not None
        context, loop = self.context, asyncio.get_running_loop()
        make = connection_factory(context.connections, self._runner.server, context.options)
        settings: dict[str, Any] = {"backlog": BACKLOG}
        if self.tls is not None:
            settings |= {
                "ssl": self.tls,
                "ssl_handshake_timeout": context.options.header_timeout_s,
                "ssl_shutdown_timeout": CLOSING_WRITE_S,
            }
        try:
            both = _both_families(host, port)
            where = {"host": host, "port": port} if both is None else {"sock": both}
            self._listening = await loop.create_server(make, **where, **settings)
        except OSError as error:
            await self._runner.cleanup()
            if isinstance(error, socket.gaierror):
                raise ConfigError(
                    f"host: got {host!r}, expected an address of this machine or its name "
                    f"({error.strerror})",
                    param="host",
                ) from None
            raise
        loop.set_exception_handler(context.connections.on_loop_error)
        addresses = [one.getsockname() for one in self._listening.sockets]
        context.guard.listens_on(str(address[0]) for address in addresses)
        return int(addresses[0][1])

    async def stop(
        self, grace_s: float | None = None, *, hurry: asyncio.Event | None = None
    ) -> None:
        """Shut down: refuse new requests, let the others end, cancel the rest, stop listening.

        Meanwhile ``/health`` answers 200 and ``/ready`` 503.

        Args:
            grace_s: seconds for running requests; None is the option's.
            hurry: when set, the rest of the grace is skipped.
        """
        context = self.context
        context.is_closing = True
        context.connections.close()
        grace_s = context.options.shutdown_grace_s if grace_s is None else grace_s
        waits = [asyncio.create_task(context.wait_idle(grace_s))]
        if hurry is not None:
            waits.append(asyncio.create_task(_until_set(hurry)))
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        engine = context.attached_engine
        if engine is not None:
            # Ends what is left with RequestCancelled, which handlers turn into their last event.
            await asyncio.to_thread(engine.close, 0.0)
        await context.wait_idle(HANDLER_END_S)
        if self._listening is not None:
            self._listening.close()
        await self._runner.cleanup()
        context.lanes.end()
        telemetry = self.app.get(TELEMETRY)
        if telemetry is not None:
            await asyncio.to_thread(telemetry.close)


def _both_families(host: str, port: int) -> socket.socket | None:
    """Return what listens on all addresses for '::'; asyncio would take it for those of IPv6 alone.

    None: it is another host, or the system has no IPv6.
    """
    try:
        is_all = ipaddress.IPv6Address(host) == ipaddress.IPv6Address("::")
    except ValueError:
        return None
    if not is_all or not socket.has_dualstack_ipv6():
        return None
    return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)


async def _until_set(event: asyncio.Event) -> bool:
    return await event.wait()


@contextlib.contextmanager
def _signals(on_signal: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def serve(
    load: Callable[[], ServedEngine],
    host: str,
    port: int,
    options: ServerOptions | None = None,
    on_ready: Callable[[str], None] | None = None,
    on_stop: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; a second one skips the grace.

    Listens before the model is loaded, so that ``/health`` answers meanwhile and a taken port is
    noticed at once.

    Args:
        load: makes the engine; called in a thread.
        host: address to listen on.
        port: 0 lets the system choose.
        options: settings of the server.
        on_ready: called with the URL once requests are taken.
        on_stop: called with the first signal; ``load`` may then raise, as serve() no
            longer waits for its engine.

    Raises:
        ConfigError: there is no such host.
        OSError: cannot listen.
        FlowPrefillError: the engine did not start.
    """
    raise_file_limit()
    server = Server(None, options)
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if on_stop is not None and not stop.is_set():
            on_stop()
        (hurry if stop.is_set() else stop).set()

    port = await server.start(host, port)
    with _signals(on_signal):
        loading = asyncio.create_task(asyncio.to_thread(load))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                server.context.attach(loading.result())
                if on_ready is not None:
                    shown = f"[{host}]" if ":" in host else host  # an IPv6 address
                    on_ready(f"{'https' if server.tls else 'http'}://{shown}:{port}")
                await stop.wait()
        finally:
            stopping.cancel()
            await server.stop(hurry=hurry)
            if server.context.attached_engine is None:
                await _close_unattached(loading)


async def _close_unattached(loading: asyncio.Task[ServedEngine]) -> None:
    """Wait for an engine that was still loading when the server stopped, and close it."""
    await asyncio.wait({loading})
    if loading.exception() is None:
        await asyncio.to_thread(loading.result().close, 0.0)
