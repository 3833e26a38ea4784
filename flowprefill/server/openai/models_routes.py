"""GET /v1/models, /health, /ready, /version, /load, /server_info: what is served; for app.py."""

from __future__ import annotations

import dataclasses
from typing import Any

from aiohttp import web

from flowprefill.errors import NotReady
from flowprefill.server.context import SERVER, ServerContext
from flowprefill.server.http.errors import ENGINE_FAILED, error_headers
from flowprefill.version import __version__


def _model_object(context: ServerContext, name: str) -> dict[str, Any]:
    engine = context.engine
    return {
        "id": name,
        "object": "model",
        "created": engine.created,
        "owned_by": "flowprefill",
        "root": engine.model_id,
        "max_model_len": engine.max_model_len,
    }


async def list_models(request: web.Request) -> web.Response:
    """Handle GET /v1/models."""
    context = request.app[SERVER]
    models = [_model_object(context, name) for name in context.model_names()]
    return web.json_response({"object": "list", "data": models})


async def get_model(request: web.Request) -> web.Response:
    """Handle GET /v1/models/{id}; ids may contain slashes."""
    context = request.app[SERVER]
    name = context.check_model(request.match_info["id"])
    return web.json_response(_model_object(context, name))


async def health(request: web.Request) -> web.Response:
    """Handle GET /health: 503 once the engine has failed, so that a supervisor restarts us.

    While a model loads or a server shuts down there is nothing to restart.
    """
    if request.app[SERVER].has_failed:
        return web.json_response({"status": "failed", "reason": ENGINE_FAILED}, status=503)
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Handle GET /ready: whether requests are taken, on which device and why."""
    context = request.app[SERVER]
    engine = context.attached_engine
    if context.is_closing:
        status, reason = "closing", "the server is shutting down"
    elif engine is None:
        status, reason = "loading", "the model is still loading"
    elif engine.has_failed:
        status, reason = "failed", ENGINE_FAILED
    elif not engine.is_ready:
        status, reason = "not ready", "the engine takes no requests"
    else:
        body = {"status": "ready", "model": engine.model_id, **engine.describe()}
        return web.json_response(body)
    return web.json_response(
        {"status": status, "reason": reason}, status=503, headers=error_headers(NotReady(reason))
    )


async def version(request: web.Request) -> web.Response:
    """Handle GET /version."""
    return web.json_response(
        {"version": __version__, "system_fingerprint": request.app[SERVER].fingerprint or None}
    )


async def load(request: web.Request) -> web.Response:
    """Handle GET /load: how much is being done."""
    context = request.app[SERVER]
    engine = context.attached_engine
    body = {"server_load": context.generating}
    if engine is not None:
        stats = engine.stats()
        body |= {"running": stats.running, "waiting": stats.waiting, "suspended": stats.suspended}
    return web.json_response(body)


async def server_info(request: web.Request) -> web.Response:
    """Handle GET /server_info: what runs here, with which settings."""
    context = request.app[SERVER]
    engine = context.engine
    body = {
        "version": __version__,
        "model": engine.model_id,
        "max_model_len": engine.max_model_len,
        "vocab_size": engine.vocab_size,
        **engine.describe(),
        "engine_settings": dataclasses.asdict(engine.config),
        "server_settings": context.options.shown(),
    }
    return web.json_response(body)
