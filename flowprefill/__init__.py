"""LLM prefill that preempts between operators. What users import, loaded on first use.

`import flowprefill` reads two small files. Torch and the native module are loaded by the first
use of `Engine`: `flowprefill --help`, the scheduler and the simulator start at once without them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from flowprefill.version import __version__

if TYPE_CHECKING:
    from flowprefill.config import EngineConfig, Granularity
    from flowprefill.engine import Engine
    from flowprefill.errors import (
        CheckpointError,
        ConfigError,
        DeadlinePassed,
        FlowPrefillError,
        InvalidRequest,
        ModelNotFound,
        NotReady,
        Overloaded,
        PromptTooLong,
        RequestCancelled,
        RequestFailed,
    )
    from flowprefill.request import (
        SLO,
        Completion,
        Request,
        SamplingParams,
        StructuredOutput,
        Timings,
        Token,
    )

_HOME = {
    "Engine": "engine",
    "EngineConfig": "config",
    "Granularity": "config",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DeadlinePassed": "errors",
    "FlowPrefillError": "errors",
    "InvalidRequest": "errors",
    "ModelNotFound": "errors",
    "NotReady": "errors",
    "Overloaded": "errors",
    "PromptTooLong": "errors",
    "RequestCancelled": "errors",
    "RequestFailed": "errors",
    "SLO": "request",
    "Completion": "request",
    "Request": "request",
    "SamplingParams": "request",
    "StructuredOutput": "request",
    "Timings": "request",
    "Token": "request",
}

__all__ = [
    "SLO",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DeadlinePassed",
    "Engine",
    "EngineConfig",
    "FlowPrefillError",
    "Granularity",
    "InvalidRequest",
    "ModelNotFound",
    "NotReady",
    "Overloaded",
    "PromptTooLong",
    "Request",
    "RequestCancelled",
    "RequestFailed",
    "SamplingParams",
    "StructuredOutput",
    "Timings",
    "Token",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
