"""OpenTelemetry: one span a request with its phases, the standard metrics, and nothing when off."""

from __future__ import annotations

import http.server
import itertools
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import WAIT_S, FakeEngine, Script
from running_server import RunningServer, StartServer

from flowprefill.config import EngineConfig
from flowprefill.errors import ConfigError, RequestFailed
from flowprefill.server import app, observe
from flowprefill.server.observe import telemetry
from flowprefill.server.observe.open_telemetry import open_telemetry, wanted_signals
from flowprefill.server.observe.telemetry import Call, Telemetry
from flowprefill.server.options import ServerOptions

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5, "max_tokens": 20}


class Recorded:
    """A server whose spans and metrics stay in memory; ended before they are read."""

    def __init__(self, server: RunningServer, spans: Any, reader: Any) -> None:
        self.server, self._spans, self._reader = server, spans, reader

    def spans(self) -> list[Any]:
        self.server.server.app[telemetry.TELEMETRY].close(WAIT_S)
        return list(self._spans.get_finished_spans())

    def roots(self) -> list[Any]:
        return [one for one in self.spans() if one.kind.name == "SERVER"]


@pytest.fixture
def recorded(
    engine: FakeEngine, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> Recorded:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from flowprefill.server.observe.otel import OtelSink

    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    made = Telemetry(OtelSink(SimpleSpanProcessor(spans), reader))
    monkeypatch.setattr(app, "open_telemetry", lambda _: made)
    return Recorded(start_server(engine), spans, reader)


def test_a_request_is_one_span_with_its_phases(recorded: Recorded) -> None:
    reply = recorded.server.post("/v1/chat/completions", CHAT, TRACEPARENT).json()
    spans = recorded.spans()
    (root,) = (one for one in spans if one.kind.name == "SERVER")
    assert root.name == "chat fake-model"
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.context.trace_state.get("vendor") == "1"
    assert dict(root.attributes) == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "flowprefill",
        "gen_ai.request.model": "fake-model", "gen_ai.response.model": "fake-model",
        "gen_ai.response.id": reply["id"], "gen_ai.request.max_tokens": 20,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 1.0,
        "gen_ai.request.stream": False, "gen_ai.usage.input_tokens": 19,
        "gen_ai.usage.output_tokens": 12, "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("stop",), "flowprefill.service_class": "default",
        "flowprefill.preemptions": 1, "http.request.method": "POST",
        "http.route": "/v1/chat/completions", "http.response.status_code": 200,
    }  # fmt: skip
    phases = {one.name: one for one in spans if one is not root}
    assert set(phases) == {"preprocess", "queue", "prefill", "suspended", "decode"}
    for name, one in phases.items():
        under = phases["prefill"] if name == "suspended" else root
        assert one.parent.span_id == under.context.span_id
        assert root.start_time <= one.start_time <= one.end_time

    def seconds(name: str) -> float:
        return (phases[name].end_time - phases[name].start_time) / 1e9

    # As the engine told: see FakeHandle._timings.
    assert seconds("queue") == pytest.approx(0.00075, abs=1e-6)
    assert seconds("prefill") == pytest.approx(0.007, abs=1e-6)
    assert seconds("suspended") == pytest.approx(0.002, abs=1e-6)
    assert seconds("decode") == pytest.approx(0.012, abs=1e-6)
    order = ("preprocess", "queue", "prefill", "decode")
    for before, after in itertools.pairwise(order):
        assert phases[before].end_time == phases[after].start_time


def test_choices_have_phases_of_their_own(recorded: Recorded) -> None:
    recorded.server.post("/v1/completions", {"prompt": ["a", "bc"], "n": 2})
    spans = recorded.spans()
    (root,) = (one for one in spans if one.kind.name == "SERVER")
    assert root.name == "text_completion fake-model"
    assert root.parent is None
    assert root.attributes["gen_ai.request.choice.count"] == 2
    assert root.attributes["gen_ai.usage.input_tokens"] == 5  # each prompt once, with its BOS
    assert root.attributes["gen_ai.usage.output_tokens"] == 48
    assert root.attributes["gen_ai.response.finish_reasons"] == ("stop",) * 4
    queues = [one.attributes["flowprefill.choice"] for one in spans if one.name == "queue"]
    assert queues == [0, 1, 2, 3]


def test_what_fails_is_told_and_what_is_no_generation_is_not(
    recorded: Recorded, engine: FakeEngine
) -> None:
    server = recorded.server
    server.get("/health")
    server.get("/v1/completions")
    assert server.post("/v1/completions", {"prompt": 5}).status == 400
    engine.script = Script(error=RequestFailed("operator 3"))
    assert server.post("/v1/completions", {"prompt": "a"}).status == 500
    engine.script = Script(error=RequestFailed("operator 3"), error_at=2)
    assert server.post("/v1/completions", {"prompt": "a", "stream": True}).status == 200
    engine.script = Script(gates={2: threading.Event()})
    gone = server.raw_socket("/v1/completions", {"prompt": "a"})
    engine.wait_submitted(3)
    gone.close()
    engine.wait_ended(3)
    wait_until_idle(server)
    roots = recorded.roots()
    told = [(one.attributes["error.type"], one.status.status_code.name) for one in roots]
    assert told == [("400", "UNSET"), ("500", "ERROR"), ("failed", "ERROR"), ("499", "UNSET")]
    assert roots[3].attributes["gen_ai.response.finish_reasons"] == ("cancelled",)


def wait_until_idle(server: RunningServer) -> None:
    assert server.call(server.server.context.wait_idle(WAIT_S))


def test_a_caller_that_does_not_sample_is_obeyed(recorded: Recorded) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    assert recorded.server.post("/v1/completions", {"prompt": "a"}, headers).status == 200
    assert (
        recorded.server.post("/v1/completions", {"prompt": "a"}, {"traceparent": "x"}).status == 200
    )
    (root,) = recorded.roots()
    assert root.parent is None


def test_standard_metrics(recorded: Recorded, engine: FakeEngine) -> None:
    server = recorded.server
    for _ in range(2):
        server.post("/v1/chat/completions", CHAT)
    server.post("/v1/completions", {"prompt": "a", "n": 3})
    server.post("/v1/completions", {"prompt": 5})
    wait_until_idle(server)
    made = server.server.app[telemetry.TELEMETRY]
    read: dict[str, dict[tuple[str | None, ...], Any]] = {}
    wait_for_spans(recorded, 4)
    data = recorded._reader.get_metrics_data()
    (resource,) = data.resource_metrics
    assert resource.resource.attributes["service.name"] == "flowprefill"
    for metric in resource.scope_metrics[0].metrics:
        assert metric.unit == "s"
        labels = ("gen_ai.operation.name", "gen_ai.request.model", "error.type")
        read[metric.name] = {
            tuple(point.attributes.get(label) for label in labels): point
            for point in metric.data.data_points
        }
    chat, text = ("chat", "fake-model", None), ("text_completion", "fake-model", None)
    refused = ("text_completion", None, "400")
    duration = read["gen_ai.server.request.duration"]
    assert {key: point.count for key, point in duration.items()} == {chat: 2, text: 1, refused: 1}
    first = read["gen_ai.server.time_to_first_token"]
    assert {key: point.count for key, point in first.items()} == {chat: 2, text: 3}
    assert first[chat].sum == pytest.approx(0.016)
    assert first[chat].explicit_bounds[:3] == (0.001, 0.005, 0.01)
    token = read["gen_ai.server.time_per_output_token"]
    assert token[text].sum == pytest.approx(0.003)
    assert made.left_out == 0


def wait_for_spans(recorded: Recorded, count: int) -> None:
    """Wait until the telemetry thread has written so many requests, without ending it."""
    for _ in range(int(WAIT_S / 0.01)):
        spans = recorded._spans.get_finished_spans()
        if sum(one.kind.name == "SERVER" for one in spans) >= count:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"not {count} requests in {WAIT_S} s")


class Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP over HTTP and keeps what comes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CollectorHandler)
        self.bodies: dict[str, list[bytes]] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()


class CollectorHandler(http.server.BaseHTTPRequestHandler):
    """One request of an exporter."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, Collector)
        self.server.bodies.setdefault(self.path, []).append(body)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_collector_gets_spans_and_metrics(
    engine: FakeEngine,
    start_server: StartServer,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    by_variable: bool,
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
        ExportMetricsServiceRequest,
    )
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    url = f"http://127.0.0.1:{collector.server_port}"
    options = {} if by_variable else {"otlp_endpoint": url}
    if by_variable:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "shop")
    server = start_server(engine, **options)
    server.post("/v1/completions", {"prompt": "a"}, TRACEPARENT)
    assert url not in server.get("/server_info").body.decode()
    server.stop()
    spans = ExportTraceServiceRequest.FromString(b"".join(collector.bodies["/v1/traces"]))
    (of_resource,) = spans.resource_spans
    resource = {one.key: one.value.string_value for one in of_resource.resource.attributes}
    assert resource["service.name"] == ("shop" if by_variable else "flowprefill")
    names = [span.name for span in of_resource.scope_spans[0].spans]
    assert "text_completion fake-model" in names
    assert {span.trace_id.hex() for span in of_resource.scope_spans[0].spans} == {TRACE}
    metrics = ExportMetricsServiceRequest.FromString(collector.bodies["/v1/metrics"][-1])
    found = {one.name for one in metrics.resource_metrics[0].scope_metrics[0].metrics}
    assert "gen_ai.server.request.duration" in found


def test_a_collector_that_is_not_there_holds_nothing_up(
    engine: FakeEngine, start_server: StartServer
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    server = start_server(engine, otlp_endpoint="http://127.0.0.1:9")
    for _ in range(20):
        assert server.post("/v1/completions", {"prompt": "a"}).status == 200
    server.stop()  # within RunningServer's limit


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_BSP_SCHEDULE_DELAY", "0"), ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "x"), ("OTEL_METRICS_EXEMPLAR_FILTER", "x"),
    ],
)  # fmt: skip
def test_variables_that_opentelemetry_refuses_do_not_stop_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str
) -> None:
    pytest.importorskip("opentelemetry.sdk")
    monkeypatch.setenv(name, value)
    before = set(threading.enumerate())  # another test's may be ending
    url = "http://127.0.0.1:9"
    assert open_telemetry(ServerOptions(), {"OTEL_EXPORTER_OTLP_ENDPOINT": url}) is None
    assert "no telemetry: OpenTelemetry refuses" in caplog.text
    with pytest.raises(ConfigError, match=r"otlp_endpoint: OpenTelemetry refuses its OTEL_\*"):
        open_telemetry(ServerOptions(otlp_endpoint=url), {})
    assert set(threading.enumerate()) <= before


def test_a_short_queue_of_spans_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
    wanted = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_METRICS_EXPORTER": "none"}
    made = open_telemetry(ServerOptions(), wanted)
    assert made is not None
    made.close(WAIT_S)


def test_off_there_is_no_middleware_and_no_thread(
    engine: FakeEngine, start_server: StartServer
) -> None:
    before = set(threading.enumerate())  # another test's may be ending
    server = start_server(engine)
    server.post("/v1/completions", {"prompt": "a"})
    assert telemetry.TELEMETRY not in server.server.app
    assert telemetry.telemetry_middleware not in server.server.app.middlewares
    new = set(threading.enumerate()) - before
    assert not any("telemetry" in one.name or "Otel" in one.name for one in new)


def test_without_the_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(observe, "otel", raising=False)
    monkeypatch.setitem(sys.modules, "flowprefill.server.observe.otel", None)
    with pytest.raises(ConfigError, match=r"flowprefill\[otel\]") as caught:
        open_telemetry(ServerOptions(otlp_endpoint="http://localhost:4318"), {})
    assert caught.value.param == "otlp_endpoint"
    # Variables may be set for every service of a machine: they do not stop this one.
    assert open_telemetry(ServerOptions(), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}) is None
    assert "flowprefill[otel]" in caplog.text
    assert open_telemetry(ServerOptions(), {}) is None


@pytest.mark.parametrize(
    ("endpoint", "environment", "signals"),
    [
        ("", {}, (False, False)),
        ("http://a", {}, (True, True)),
        ("", {"EXPORTER_OTLP_ENDPOINT": "http://a"}, (True, True)),
        ("", {"EXPORTER_OTLP_TRACES_ENDPOINT": "http://a"}, (True, False)),
        ("", {"EXPORTER_OTLP_METRICS_ENDPOINT": "http://a"}, (False, True)),
        ("", {"TRACES_EXPORTER": "otlp"}, (True, False)),
        ("http://a", {"METRICS_EXPORTER": "none"}, (True, False)),
        ("http://a", {"TRACES_EXPORTER": "console"}, (False, True)),
        ("http://a", {"SDK_DISABLED": "true"}, (False, False)),
        ("", {"EXPORTER_OTLP_ENDPOINT": "", "TRACES_EXPORTER": ""}, (False, False)),
    ],
)
def test_variables_mean_what_they_mean_elsewhere(
    endpoint: str, environment: dict[str, str], signals: tuple[bool, bool]
) -> None:
    named = {f"OTEL_{name}": value for name, value in environment.items()}
    assert wanted_signals(endpoint, named) == signals


@pytest.mark.parametrize("wrong", ["localhost:4318", "grpc://a", "http://", 5])
def test_an_endpoint_is_a_url(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        ServerOptions(otlp_endpoint=wrong)


class StuckSink:
    """A sink that waits."""

    def __init__(self) -> None:
        self.gate, self.calls = threading.Event(), 0

    def write(self, call: Call, records: list[Any]) -> None:
        self.gate.wait(WAIT_S)
        self.calls += 1

    def close(self) -> None:
        self.gate.set()


def test_a_stuck_exporter_costs_entries_not_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "MAX_QUEUED", 10)
    sink = StuckSink()
    made = Telemetry(sink)
    call = Call("/v1/completions", {}, 0, 0.0, 0.0, 200, None)
    for _ in range(100):
        made.add(call)
    assert 80 <= made.left_out <= 90
    sink.gate.set()
    made.close(WAIT_S)
    assert sink.calls == 100 - made.left_out


def test_slo_and_class_are_told(recorded: Recorded, engine: FakeEngine) -> None:
    engine.config = EngineConfig(classes={"chat": {"ttft_ms": 250}})
    recorded.server.post("/v1/completions", {"prompt": "a", "slo": {"class": "chat"}})
    (root,) = recorded.roots()
    assert root.attributes["flowprefill.service_class"] == "chat"
    assert root.attributes["flowprefill.slo_met"] is True
