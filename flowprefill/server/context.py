"""What every handler shares: engine, options, metrics, state of the server; one per application."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from aiohttp import web

from flowprefill.errors import InvalidRequest, ModelNotFound, NotReady
from flowprefill.server.engine_protocol import ServedEngine, ServedHandle
from flowprefill.server.http.body import UnknownFields
from flowprefill.server.http.body_memory import BodyMemory
from flowprefill.server.lanes import Lanes
from flowprefill.server.observe.live_feed import LiveFeed
from flowprefill.server.options import ServerOptions
from flowprefill.server.responses.response_store import ResponseStore
from flowprefill.server.slo import ClientRules
from flowprefill.server.tenants import Tenants, network_of
from flowprefill.version import __version__

if TYPE_CHECKING:
    from flowprefill.engine.records import EngineObserver
    from flowprefill.server.http.connections import ConnectionTable
    from flowprefill.server.http.guard import Guard
    from flowprefill.server.observe.metrics import ServerMetrics


class DebugOff(InvalidRequest):
    """The server keeps to itself what it knows about the requests of others."""

    status = 404
    code = "debug_routes_off"


class ServerContext:
    """State of one application; used from its event loop only.

    The engine may come later than the server, so that ``/health`` answers while a model loads.
    """

    def __init__(
        self,
        engine: ServedEngine | None,
        options: ServerOptions,
        metrics: ServerMetrics,
        connections: ConnectionTable,
        guard: Guard,
    ) -> None:
        self.options = options
        self.connections = connections
        self.guard = guard
        self.metrics = metrics
        self.unknown_fields = UnknownFields(refuses=options.unknown_fields == "refuse")
        self.body_memory = BodyMemory(int(options.max_bodies_mib * 2**20))
        self._tenants = Tenants(options.tenants, options.api_key)
        self.live = LiveFeed()
        self.responses = ResponseStore(options.max_stored_responses)
        self.is_closing = False
        self.generating = 0
        self.lanes = Lanes()
        self._idle = asyncio.Event()
        self._idle.set()
        self._engine: ServedEngine | None = None
        self._observers: list[EngineObserver] = []
        self.fingerprint = ""
        if engine is not None:
            self.attach(engine)

    def attach(self, engine: ServedEngine) -> None:
        """Start serving ``engine``; raises ConfigError if a service tier names no class of it."""
        self.options.check_classes(engine.config)
        identity = (
            f"{__version__}|{engine.model_id}|{engine.config.dtype}|{engine.config.quantization}"
        )
        self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]
        self._engine = engine
        self.metrics.observe(engine)
        if self.options.page:
            engine.subscribe(self.live)
        for observer in self._observers:
            engine.subscribe(observer)

    def on_attach(self, observer: EngineObserver) -> None:
        """Have an observer told what the engine does, also if it is attached later."""
        self._observers.append(observer)
        if self._engine is not None:
            self._engine.subscribe(observer)

    @property
    def attached_engine(self) -> ServedEngine | None:
        """The engine, or None while the model is loading."""
        return self._engine

    @property
    def has_failed(self) -> bool:
        """Whether there is an engine that takes no requests any more, ever."""
        return self._engine is not None and self._engine.has_failed

    @property
    def engine(self) -> ServedEngine:
        """The engine; raises NotReady while it cannot take requests."""
        if self.is_closing:
            raise NotReady("the server is shutting down")
        if self._engine is None:
            raise NotReady("the model is still loading")
        return self._engine

    def rules_for(self, headers: Mapping[str, str], address: str | None) -> ClientRules:
        """Return what a client may state, by its key; raises Unauthorized."""
        options = self.options
        tenant = self._tenants.of(headers)
        return ClientRules(
            options.client_slo,
            options.client_priority,
            options.min_ttft_ms,
            tenant,
            tenant.name or network_of(address),
        )

    def check_debug(self, headers: Mapping[str, str]) -> None:
        """Let a client see what concerns the requests of all.

        Raises:
            DebugOff: ``debug_routes`` keeps it from everyone.
            Unauthorized: there are tenants, and the client has no key of theirs.
        """
        wanted = self.options.debug_routes
        if wanted == "off" or (wanted == "auto" and not self.guard.is_local):
            raise DebugOff("debug routes are off here; --debug-routes on serves them", param="url")
        self.check_key(headers)

    def check_key(self, headers: Mapping[str, str]) -> None:
        """Let a client ask; raises Unauthorized if the server has keys, and it sends none of them.

        Before its body is read: strangers get no memory.
        """
        self._tenants.of(headers)

    def model_names(self) -> tuple[str, ...]:
        """Return the names the model answers to, the reported one first."""
        return self.options.served_model_names or (self.engine.model_id,)

    def check_model(self, name: str | None) -> str:
        """Return the name to report; raises ModelNotFound for a name that is not served."""
        names = self.model_names()
        if name is None:
            return names[0]
        if name not in names:
            shown = name if len(name) <= 80 else name[:77] + "..."
            raise ModelNotFound(
                f"model: {shown!r} is not served here, expected {' or '.join(names)}",
                param="model",
            )
        return name

    def begin_generation(self) -> None:
        """Count one generating HTTP request in."""
        self.generating += 1
        self._idle.clear()

    def end_generation(self) -> None:
        """Count it out."""
        self.generating -= 1
        if self.generating == 0:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing generates; False if it took longer than ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


SERVER = web.AppKey("server", ServerContext)
REQUEST_ID = web.RequestKey("request_id", str)
# What the request submitted to the engine, for the access log.
HANDLES = web.RequestKey("handles", list[ServedHandle])
# Set where writing to a stream found its client gone, before anything cancelled the handler.
IS_CLIENT_GONE = web.RequestKey("is_client_gone", bool)
