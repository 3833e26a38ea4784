"""Fills the Prometheus metrics of metric_table.py from what the engine reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flowprefill.engine.records import EngineStats, RequestRecord
from flowprefill.server.engine_protocol import ServedEngine
from flowprefill.server.observe.metric_table import METRICS, PREFIX, VLLM_PREFIX, MetricSpec

_SUCCESS = ("stop", "length")


class ServerMetrics:
    """All metrics of one server, in their own registry.

    Thread: observer methods come from the engine's thread, `render` and `count_shed` from the
    server's; the client library locks each metric.
    """

    def __init__(self, *, vllm_names: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._model = ""
        for spec in METRICS:
            labels = ("model_name", *spec.labels)
            if spec.kind == "histogram":
                self._histograms[spec.name] = Histogram(
                    PREFIX + spec.name, spec.doc, labels, buckets=spec.buckets, registry=None
                )
            elif spec.kind == "counter" and spec.name not in _STATS:
                counter = Counter(PREFIX + spec.name, spec.doc, labels, registry=None)
                self._counters[spec.name] = counter
        self._engine: ServedEngine | None = None
        self.registry.register(_Families(self, vllm_names))
        ProcessCollector(registry=self.registry)  # process_*: memory, CPU time, open files

    def observe(self, engine: ServedEngine) -> None:
        """Start counting what ``engine`` does."""
        self._engine = engine
        self._model = engine.model_id
        engine.subscribe(self)

    def render(self) -> bytes:
        """Return the text exposition; Cost: one `stats()` and a pass over every sample."""
        return generate_latest(self.registry)

    def _add(self, name: str, amount: float = 1.0, /, **labels: str) -> None:
        self._counters[name].labels(model_name=self._model, **labels).inc(amount)

    def _see(self, name: str, value: float | None, /, **labels: str) -> None:
        if value is not None:
            self._histograms[name].labels(model_name=self._model, **labels).observe(value)

    def count_shed(self, reason: str) -> None:
        """Count a request that was refused or dropped; ``reason`` is the error's code."""
        self._add("requests_shed_total", 1.0, reason=reason)

    def on_preemption(self, reason: str, ack_s: float) -> None:
        """Count one suspension of a run."""
        self._add("preemptions_total", 1.0, reason=reason)
        self._see("preempt_ack_seconds", ack_s)

    def on_decision(self, seconds: float) -> None:
        """Count one scheduling decision."""
        self._see("scheduler_decision_seconds", seconds)

    def on_end(self, record: RequestRecord) -> None:
        """Count one ended request."""
        group = {"class": record.slo.service_class}
        self._add("requests_total", 1.0, finished_reason=record.finish_reason, **group)
        self._add("prompt_tokens_total", record.prompt_tokens, **group)
        self._add("generation_tokens_total", record.output_tokens, **group)
        self._see("cancel_to_free_seconds", record.cancel_to_free_s)
        self._see_timings(record, group)
        self._count_objectives(record, group)

    def _see_timings(self, record: RequestRecord, group: dict[str, str]) -> None:
        timings = record.timings
        self._see("request_queue_time_seconds", timings.queue, **group)
        self._see("request_preprocess_time_seconds", timings.preprocess, **group)
        self._see("request_waiting_time_seconds", timings.waiting, **group)
        self._see("request_prefill_time_seconds", timings.prefill_run, **group)
        self._see("request_suspended_seconds", timings.suspended, **group)
        self._see("request_preemptions", float(timings.preemptions), **group)
        if timings.ttft is None:
            return
        self._see("time_to_first_token_seconds", timings.ttft, **group)
        self._see("e2e_request_latency_seconds", timings.total, **group)
        self._see("request_decode_time_seconds", max(timings.total - timings.ttft, 0.0), **group)
        self._see("request_time_per_output_token_seconds", timings.mean_itl, **group)
        for gap_s in record.token_gaps_s:
            self._see("inter_token_latency_seconds", gap_s, **group)
        if timings.predicted_ttft is not None:
            late_s = timings.ttft - timings.predicted_ttft
            direction = "late" if late_s > 0 else "early"
            self._see("ttft_prediction_error_seconds", abs(late_s), direction=direction)

    def _count_objectives(self, record: RequestRecord, group: dict[str, str]) -> None:
        """Count objectives met and missed; a cancelled request says nothing about either."""
        slo, timings = record.slo, record.timings
        if record.finish_reason == "cancelled":
            return
        if slo.ttft is not None:
            met = timings.ttft is not None and timings.ttft <= slo.ttft
            self._add("slo_requests_total", 1.0, slo="ttft", met=str(met).lower(), **group)
        if slo.tpot is not None and timings.ttft is not None:
            met = timings.mean_itl is None or timings.mean_itl <= slo.tpot
            self._add("slo_requests_total", 1.0, slo="tpot", met=str(met).lower(), **group)
        if timings.slo_met and record.finish_reason in _SUCCESS:
            self._add("goodput_requests_total", 1.0, **group)

    def families(self) -> Iterable[Metric]:
        """Yield every metric's samples in the order of the table."""
        stats = self._engine.stats() if self._engine is not None else None
        for spec in METRICS:
            if spec.name in self._counters:
                yield from self._counters[spec.name].collect()
            elif spec.name in self._histograms:
                yield from self._histograms[spec.name].collect()
            elif stats is not None:
                yield self._of_stats(spec, _STATS[spec.name](stats))

    def _of_stats(self, spec: MetricSpec, value: float) -> Metric:
        family = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
        metric = family(PREFIX + spec.name, spec.doc, labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric


_STATS: dict[str, Callable[[EngineStats], float]] = {
    "num_requests_running": lambda stats: stats.running,
    "num_requests_waiting": lambda stats: stats.waiting,
    "num_requests_suspended": lambda stats: stats.suspended,
    "num_requests_held": lambda stats: stats.held,
    "kv_cache_usage_perc": lambda stats: stats.kv_blocks_used / max(stats.kv_blocks_total, 1),
    "kv_blocks_cached": lambda stats: stats.kv_blocks_cached,
    "workspace_bytes": lambda stats: stats.workspace_bytes,
    "max_blocking_seconds": lambda stats: stats.max_blocking_s,
    "segments_total": lambda stats: stats.segments,
    "prefix_cache_queries_total": lambda stats: stats.prefix_cache_queries,
    "prefix_cache_hits_total": lambda stats: stats.prefix_cache_hits,
}


class _Families(Collector):
    """Hands the registry our metrics and, if wanted, the same under vLLM's names."""

    def __init__(self, metrics: ServerMetrics, vllm_names: bool) -> None:
        self._metrics = metrics
        self._vllm = {
            PREFIX + spec.family: VLLM_PREFIX + spec.vllm.removesuffix("_total")
            for spec in METRICS
            if spec.vllm and vllm_names
        }

    def collect(self) -> Iterable[Metric]:
        for metric in self._metrics.families():
            # The client library adds when each counter was made: series that docs/metrics.md lacks.
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric
            if metric.name in self._vllm:
                yield _renamed(metric, self._vllm[metric.name])


def _renamed(metric: Metric, name: str) -> Metric:
    """Return a copy under another name; of ended requests only the successful ones."""
    alias = Metric(name, metric.documentation, metric.type)
    for sample in metric.samples:
        if sample.labels.get("finished_reason", "stop") in _SUCCESS:
            suffix = sample.name.removeprefix(metric.name)
            alias.add_sample(name + suffix, sample.labels, sample.value, sample.timestamp)
    return alias
