"""Traces: what arrives when, read from production traces or made by a seeded generator.

Pure: the standard library only. Benches replay traces on an engine, the simulator on a
virtual clock. `read_trace` or `synthetic_trace`, then `with_objectives`, then transforms.
"""

from __future__ import annotations

from flowprefill.traces.objectives import (
    ObjectiveMap,
    built_in_maps,
    for_machine,
    load_objectives,
    objectives_for,
    with_objectives,
)
from flowprefill.traces.readers import FORMATS, read_trace
from flowprefill.traces.synthetic import synthetic_trace
from flowprefill.traces.trace import Trace, TraceRequest
from flowprefill.traces.transforms import (
    at_rate,
    clipped,
    prefill_only,
    resampled,
    resampled_requests,
    scaled_lengths,
    scaled_objectives,
    scaled_rate,
    window,
)

__all__ = [
    "FORMATS",
    "ObjectiveMap",
    "Trace",
    "TraceRequest",
    "at_rate",
    "built_in_maps",
    "clipped",
    "for_machine",
    "load_objectives",
    "objectives_for",
    "prefill_only",
    "read_trace",
    "resampled",
    "resampled_requests",
    "scaled_lengths",
    "scaled_objectives",
    "scaled_rate",
    "synthetic_trace",
    "window",
    "with_objectives",
]
