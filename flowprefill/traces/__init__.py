"""Traces: what arrives when, read from production traces or made by a seeded generator.

Pure: the standard library only. Benches replay traces on an engine, the simulator on a
virtual clock.
"""

from __future__ import annotations

from flowprefill.traces.trace import Trace, TraceRequest

__all__ = ["Trace", "TraceRequest"]
