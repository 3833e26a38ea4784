"""The engine: joins scheduler, executor, KV cache and tokenizer; used by server, CLI and users.

`Engine` is loaded on first use: the pure parts (KV blocks, sampler, handle) need no native module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowprefill.engine.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> object:
    if name == "Engine":
        from flowprefill.engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
