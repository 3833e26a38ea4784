"""OpenTelemetry's side of the telemetry: spans and metrics by the conventions for generative AI.

Needs the extra ``otel``; telemetry.py imports it where telemetry is on, and its thread calls it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from flowprefill.engine.records import RequestRecord
from flowprefill.server.observe.telemetry import Call
from flowprefill.version import __version__

PROVIDER = "flowprefill"
# A batch is encoded in Python: small ones keep the GIL for less time.
SPANS_PER_BATCH = 128
# Upper edges in seconds, as the conventions want them.
DURATION_S = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
SUCCESS = ("stop", "length")


def otlp_sink(endpoint: str, *, traces: bool, metrics: bool) -> OtelSink:
    """Return a sink that sends to a collector by OTLP over HTTP.

    Args:
        endpoint: URL without ``/v1/traces``; empty: what the environment names.
        traces: whether to send spans.
        metrics: whether to send metrics.

    Raises:
        ValueError: of a variable of OpenTelemetry's, by OpenTelemetry.
    """
    base = endpoint.rstrip("/")
    processor = reader = None
    with contextlib.ExitStack() as threads:  # of what was made before the refusal
        if traces:
            exporter = OTLPSpanExporter(endpoint=f"{base}/v1/traces" if base else None)
            processor = BatchSpanProcessor(exporter, max_export_batch_size=_batch())
            threads.callback(processor.shutdown)
        if metrics:
            url = f"{base}/v1/metrics" if base else None
            reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=url))
            threads.callback(reader.shutdown)
        sink = OtelSink(processor, reader)
        threads.pop_all()
    return sink


def _batch() -> int:
    """Return the spans of a batch: no more than the queue holds that the environment names."""
    queue = os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", "")
    return min(SPANS_PER_BATCH, int(queue)) if queue.isdecimal() else SPANS_PER_BATCH


class OtelSink:
    """Makes spans and metrics of calls, with providers of its own: nothing global is set."""

    def __init__(self, processor: SpanProcessor | None, reader: MetricReader | None) -> None:
        """Export spans by the processor and metrics by the reader; None: not at all."""
        resource = _resource()
        self._providers: list[Any] = []
        self._tracer: Any = None
        self._histograms: _Histograms | None = None
        if processor is not None:
            tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
            tracers.add_span_processor(processor)
            self._tracer = tracers.get_tracer(PROVIDER, __version__)
            self._providers.append(tracers)
        if reader is not None:
            meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
            self._histograms = _Histograms(meters.get_meter(PROVIDER, __version__))
            self._providers.append(meters)
        self._propagator = TraceContextTextMapPropagator()

    def write(self, call: Call, records: list[RequestRecord]) -> None:
        """Make the call's spans and add it to the metrics."""
        if self._tracer is not None:
            self._write_spans(call, records)
        if self._histograms is not None:
            self._histograms.add(call, records)
        time.sleep(0)  # lets go of the GIL: there may be a next call at once

    def close(self) -> None:
        """Send what is left; without a collector it takes as long as the exporter's time-outs."""
        for provider in self._providers:
            provider.shutdown()

    def _write_spans(self, call: Call, records: list[RequestRecord]) -> None:
        span = self._tracer.start_span(
            f"{call.operation} {_model_of(call)}".rstrip(),
            context=self._propagator.extract(call.trace_headers),
            kind=SpanKind.SERVER,
            attributes=_attributes(call, records),
            start_time=call.start_ns,
        )
        if span.is_recording():  # else the caller or the sampler does not want it
            for index, record in enumerate(records):
                self._write_phases(span, call, record, index if len(records) > 1 else None)
        error = error_type(call, records)
        if error is not None and (call.status >= 500 or call.status == 200):
            span.set_status(StatusCode.ERROR, error)
        span.end(end_time=_ns(call, call.end_s))

    def _write_phases(
        self, parent: Span, call: Call, record: RequestRecord, choice: int | None
    ) -> None:
        """Make the spans of one choice: preprocess, queue, prefill with suspensions, decode."""
        assert call.generation is not None
        timings, at = record.timings, call.generation.submitted_s
        marks: dict[str, Any] = {} if choice is None else {"flowprefill.choice": choice}

        def phase(name: str, begin_s: float, end_s: float, under: Span = parent) -> Span:
            context = set_span_in_context(under)
            begin = _ns(call, begin_s)
            span: Span = self._tracer.start_span(
                name, context=context, attributes=marks, start_time=begin
            )
            span.end(end_time=max(_ns(call, end_s), begin))
            return span

        phase("preprocess", call.start_s, at + timings.preprocess)
        phase("queue", at + timings.preprocess, at + timings.queue)
        if timings.ttft is None and not timings.prefill_run:
            return  # it never started
        first_s = at + (timings.total if timings.ttft is None else timings.ttft)
        prefill = phase("prefill", at + timings.queue, first_s)
        for from_s, to_s in timings.suspensions:
            phase("suspended", at + from_s, at + to_s, prefill)
        if timings.ttft is not None and record.output_tokens > 1:
            phase("decode", first_s, at + timings.total)


class _Histograms:
    """The three metrics that the conventions name for servers."""

    def __init__(self, meter: Any) -> None:
        def histogram(name: str, doc: str, edges: Sequence[float]) -> Any:
            return meter.create_histogram(
                name, unit="s", description=doc, explicit_bucket_boundaries_advisory=list(edges)
            )

        self._duration = histogram(
            "gen_ai.server.request.duration", "time to the end of the reply", DURATION_S
        )
        self._first = histogram(
            "gen_ai.server.time_to_first_token", "submission to first token", FIRST_TOKEN_S
        )
        self._token = histogram(
            "gen_ai.server.time_per_output_token", "mean time per token after the first", TOKEN_S
        )

    def add(self, call: Call, records: list[RequestRecord]) -> None:
        """Count a call once, its choices each."""
        labels = _labels(call)
        error = error_type(call, records)
        failed = {} if error is None else {"error.type": error}
        self._duration.record(call.end_s - call.start_s, {**labels, **failed})
        for record in records:
            if record.finish_reason in SUCCESS and record.timings.ttft is not None:
                self._first.record(record.timings.ttft, labels)
                if record.timings.mean_itl is not None:
                    self._token.record(record.timings.mean_itl, labels)


def error_type(call: Call, records: Sequence[RequestRecord]) -> str | None:
    """Return the status of an error, or how a stream that had begun failed; None: it did not."""
    if call.status >= 400:
        return str(call.status)
    failed = (one.finish_reason for one in records if one.finish_reason not in SUCCESS)
    return next(failed, None)


def _labels(call: Call) -> dict[str, str]:
    model = _model_of(call)
    labels = {"gen_ai.operation.name": call.operation, "gen_ai.provider.name": PROVIDER}
    return labels | (
        {"gen_ai.request.model": model, "gen_ai.response.model": model} if model else {}
    )


def _model_of(call: Call) -> str:
    """Return the model's name, which has been checked; empty for what was refused before."""
    return "" if call.generation is None else call.generation.envelope.model


def _attributes(call: Call, records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Return what a call's span tells: no text, neither of the prompt nor of the reply."""
    found: dict[str, Any] = {
        **_labels(call),
        "http.request.method": "POST",
        "http.route": call.route,
        "http.response.status_code": call.status,
        "error.type": error_type(call, records),
    }
    generation = call.generation
    if generation is not None:
        spec = generation.order.spec
        found |= {
            "gen_ai.response.id": generation.envelope.id,
            "gen_ai.request.max_tokens": spec.sampling.max_tokens,
            "gen_ai.request.temperature": spec.sampling.temperature,
            "gen_ai.request.top_p": spec.sampling.top_p,
            "gen_ai.request.seed": spec.sampling.seed,
            "gen_ai.request.choice.count": spec.n if spec.n > 1 else None,
            "gen_ai.request.stream": spec.stream is not None,
            "flowprefill.service_class": spec.slo.service_class,
        }
    if records and generation is not None:
        verdicts = [one.timings.slo_met for one in records if one.timings.slo_met is not None]
        firsts = generation.handles[:: generation.order.spec.n]
        found |= {
            "gen_ai.usage.input_tokens": sum(one.prompt_tokens for one in firsts),
            "gen_ai.usage.output_tokens": sum(one.output_tokens for one in records),
            "gen_ai.usage.cache_read.input_tokens": sum(one.cached_tokens for one in firsts),
            "gen_ai.response.finish_reasons": [one.finish_reason for one in records],
            "flowprefill.preemptions": sum(one.timings.preemptions for one in records),
            "flowprefill.slo_met": all(verdicts) if verdicts else None,
        }
    return {name: value for name, value in found.items() if value is not None}


def _ns(call: Call, at_s: float) -> int:
    """Return a time of the monotonic clock as nanoseconds since the epoch."""
    return call.start_ns + round((at_s - call.start_s) * 1e9)


def _resource() -> Resource:
    """Return who we are; what the environment names comes first."""
    attributes = {"service.version": __version__}
    named = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in named:
        attributes["service.name"] = PROVIDER
    return Resource.create(attributes)
